"""A run's folder -> one self-contained report.html: headline figures, curves, sample text, events, config, environment.

Of a fine-tuned run also what its task's best evaluation says. Works at any moment of a run, with whatever files exist.
"""

import math
import os
from array import array
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pretrain.config.held_out import text_of, told_of_trained_on
from pretrain.files import DATA, EVALUATION, PREDICTIONS, RESULT, TASK, TRAINED_ON, read_lines, read_object
from pretrain.report import events as said
from pretrain.report import sets, theme
from pretrain.report.curves import panel
from pretrain.report.theme import esc

EVENTS = 200
MISTAKES = 20
SHOWN = 300  # characters of a text in a table
COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_seconds")
KNOWN = ("val_loss", "val_bits_per_byte", "val_accuracy")  # whatever else is called val_... is a task's figure
SUITES = {"suite": "Tasks made of held-out text", "memorization": "Training text known by heart",
          "tasks": "LM Evaluation Harness"}  # fmt: skip
Metrics = dict[str, np.ndarray]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the run has written so far, and return its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: name a run's folder (runs/NAME)")
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    config_text, environment = (_read_text(run_dir / name) for name in ("config.yaml", "environment.json"))
    task, result, evaluation = (read_object(run_dir / name) for name in (TASK, RESULT, EVALUATION))
    happened = list(read_lines(run_dir / "events.jsonl"))
    body = [
        _header(run_dir.resolve().name, metrics, _total_steps(config_text)),
        _warning(read_object(run_dir / DATA).get(TRAINED_ON)),
        _tiles(metrics, bool(task)),
        _curves(metrics, said.marks(happened, _last(metrics["step"])), evaluation),
        *(_task(*each) for each in sets.results(task, result)),
        _mistakes(read_lines(run_dir / PREDICTIONS)),
        _suites(evaluation),
        _samples(list(read_lines(run_dir / "samples.jsonl"))),
        _events(happened),
        theme.details("Configuration", f"<pre>{esc(config_text)}</pre>" if config_text else ""),
        theme.details(f"Evaluation on all {esc(text_of(evaluation))}", _held_out(evaluation)),
        theme.details("Environment", theme.facts(environment)),
    ]
    title = esc(run_dir.resolve().name)
    text = theme.PAGE.format(title=title, style=theme.CSS, body="\n".join(part for part in body if part))
    path, tmp = run_dir / "report.html", run_dir / "report.html.tmp"
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _read_metrics(path: Path) -> Metrics:
    """{column: float64[rows]}, the task's own figures in the order of their names; NaN is for what a row lacks."""
    columns = {name: array("d") for name in (*COLUMNS, *KNOWN)}
    for number, row in enumerate(read_lines(path)):
        for name in row:
            if name.startswith("val_") and name not in columns:
                columns[name] = array("d", [math.nan]) * number
        for name, column in columns.items():
            value = row.get(name)
            column.append(value if type(value) in (int, float) else math.nan)
    order = [*COLUMNS, *KNOWN, *sets.in_order(name for name in columns if name not in (*COLUMNS, *KNOWN))]
    return {name: np.array(columns[name], dtype=np.float64) for name in order}


def _total_steps(config_text: str) -> int | None:
    try:
        return int(yaml.safe_load(config_text)["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _header(name: str, metrics: Metrics, total_steps: int | None) -> str:
    step, seconds = _last(metrics["step"]), np.nansum(metrics["step_seconds"])
    of_total = f" of {total_steps:,}" if total_steps else ""
    facts = [f"step {step:,.0f}{of_total}" if math.isfinite(step) else "no step yet"]
    facts.append(f"{_duration(seconds)} of training" if seconds else "")
    facts.append(f"written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")
    return f"<header><h1>{esc(name)}</h1><p>{' · '.join(esc(fact) for fact in facts if fact)}</p></header>"


def _warning(trained_on: str | None) -> str:
    """Where figures of validation are not of held-out text, that is said above them."""
    return f"<p><b>{esc(told_of_trained_on(trained_on))}.</b></p>" if trained_on else ""


def _tiles(metrics: Metrics, is_tuned: bool) -> str:
    """The headline figures; speeds are medians, so that a slow start or a pause does not count."""
    tiles = []

    def tile(label: str, value: float, form: str, note: str = "") -> None:
        if math.isfinite(value):
            tiles.append(f"<div><dt>{label}</dt><dd>{form.format(value)}</dd><small>{note}</small></div>")

    loss, val_loss, bits, accuracy = (_finite(metrics[name]) for name in ("loss", *KNOWN))
    tail = max(1, min(50, loss.size // 20))
    if loss.size:
        tile("Training loss", loss[-tail:].mean(), "{:.3f}", f"mean of the last {tail}" if tail > 1 else "last step")
    if val_loss.size:
        tile("Validation loss", val_loss[-1], "{:.3f}", f"best {val_loss.min():.3f}")
    if bits.size:
        tile("Bits per byte", bits[-1], "{:.3f}", f"validation, best {bits.min():.3f}")
    if accuracy.size:
        of_what = "validation" if is_tuned else "of masked tokens"
        tile("Accuracy", accuracy[-1], "{:.1%}", f"{of_what}, best {accuracy.max():.1%}")
    for name, label in _figures(metrics).items():
        values = _finite(metrics[name])
        tile(esc(label[:1].upper() + label[1:]), values[-1], "{:.4g}", f"validation, best {values.max():.4g}")
    for headline in sets.tiles(metrics):
        tile(*headline)
    tile("Tokens per second", _median(metrics["tokens_per_second"]), "{:,.0f}", "median")
    tile("MFU", _median(metrics["mfu"]), "{:.1%}", "median")
    tokens = _last(metrics["tokens"])
    tile("Tokens seen", tokens, _short(tokens), f"{tokens:,.0f}")
    return f"<dl>{''.join(tiles)}</dl>" if tiles else "<p>No step has been logged yet.</p>"


def _figures(metrics: Metrics) -> dict[str, str]:
    """The columns of a task's own figures, more of which is better, with what to call them."""
    own = (name for name in metrics if name not in (*COLUMNS, *KNOWN) and "/" not in name)
    found = [name for name in own if _finite(metrics[name]).size]
    return {name: theme.words(name) for name in found}


def _curves(metrics: Metrics, marks: dict[str, list[int]], evaluation: dict[str, Any]) -> str:
    """A panel for each figure of the steps; `marks` are drawn on all of them, and said below."""
    compressors = {f"{name} -9": evaluation.get(f"{name}_bits_per_byte") for name in ("gzip", "xz")}
    compressors = {name: value for name, value in compressors.items() if isinstance(value, float)}

    def drawn(title: str, lines: list[tuple[str, str]], levels: dict[str, float] | None = None) -> str:
        return panel(title, metrics, lines, marks, levels)

    panels = [
        drawn("Loss", [("loss", "training"), *sets.lines(metrics, "loss", "validation")]),
        drawn("Validation bits per byte", sets.lines(metrics, "bits_per_byte", "this model"), compressors),
        *(drawn(f"Validation {label}", sets.lines(metrics, name)) for name, label in sets.further(metrics)),
        drawn("Learning rate", [("lr", "")]),
        drawn("Gradient norm", [("grad_norm", "")]),
        drawn("Tokens per second", [("tokens_per_second", "")]),
        drawn("MFU", [("mfu", "")]),
    ]
    if not any(panels):
        return ""
    names = {"resume": "resumed (dotted)", "phase": "a new phase (dashed)", "fault": "a fault (red)"}
    key = "; ".join(f"{names[name]} at step {said.listed(steps)}" for name, steps in marks.items())
    return f'<section class="curves">{"".join(panels)}</section>' + (f"<p>On the curves: {key}.</p>" if key else "")


def _task(task: dict[str, Any], result: dict[str, Any]) -> str:
    """What a run was fine-tuned for, its best evaluation, and which labels it took for which."""
    figures = result.get("figures")
    if not isinstance(figures, dict):
        return ""
    best = {theme.words(name): value for name, value in figures.items()}
    parts = [f"<p>The best evaluation by {esc(theme.words(str(result.get('metric'))))}: step "
             f"{esc(result.get('step'))}.</p>", theme.records({"validation": best})]  # fmt: skip
    labels, confusion = result.get("labels"), result.get("confusion")
    if labels and confusion:
        parts.append("<h3>Labels (rows) and what was predicted (columns)</h3>")
        rows = ([label, *row] for label, row in zip(labels, confusion, strict=False))
        parts.append(theme.table("figures", rows, ["", *labels]))
    if (of_each := result.get("per_label")) and isinstance(of_each, list):
        parts.append("<h3>Each label</h3>")
        named = {str(row.get("label")): {name: row[name] for name in row if name != "label"} for row in of_each}
        parts.append(theme.records(named))
    name = str(task.get("name") or "task").replace("_", " ")
    return theme.section(f"Fine-tuned: {esc(name)}", "".join(parts))


def _mistakes(predictions: Iterator[dict[str, Any]]) -> str:
    """The first examples that the best evaluation got wrong."""
    wrong = list(sets.first_of_each((row for row in predictions if row.get("right") is False), MISTAKES))
    if not wrong:
        return ""
    columns = [name for name in wrong[0] if name not in ("right", "gold", "prediction")]
    columns = [*(name for name in columns if name != "score"), "gold", "prediction", *{"score"} & {*columns}]
    rows = [[_cut(row.get(name, "")) for name in columns] for row in wrong]
    return theme.section("What it got wrong", theme.table("texts", rows, [theme.words(name) for name in columns]))


def _cut(value: Any) -> str:
    """What an example says, or was taken for, as far as a table has room for it; tags and answers with their commas."""
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else said.brief(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _held_out(evaluation: dict[str, Any]) -> str:
    """The figures of tools/evaluate.py that are of no suite."""
    plain = {theme.words(name): value for name, value in evaluation.items() if not isinstance(value, dict)}
    return theme.table("facts", plain.items()) if plain else ""


def _suites(evaluation: dict[str, Any]) -> str:
    """What tools/evaluate.py found with --suite, --memorization and --tasks."""
    sections = []
    for name, title in SUITES.items():
        found = evaluation.get(name) or {}
        rows = {what: record for what, record in found.items() if isinstance(record, dict)}
        facts = ", ".join(f"{theme.words(key)} {said.brief(value)}" for key, value in found.items() if key not in rows)
        sections.append(theme.section(title, f"<p>{esc(facts)}</p>{theme.records(rows)}" if rows else ""))
    return "".join(sections)


def _samples(samples: list[dict[str, Any]]) -> str:
    """The newest texts the model wrote, the prompt set apart."""
    blocks = []
    for sample in samples[:-4:-1]:
        prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        text = text[len(prompt) :] if prompt and text.startswith(prompt) else text
        blocks.append(f"<h3>step {esc(sample.get('step'))}</h3><pre><b>{esc(prompt)}</b>{esc(text)}</pre>")
    return theme.section("What the model writes", "".join(blocks))


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = [
        [said.clock(group[0]), theme.words(str(group[0].get("kind"))), said.told_together(group)]
        for group in said.folded(events)
    ]
    more = f"<p>The last {EVENTS} of {len(rows):,}.</p>" if len(rows) > EVENTS else ""
    return theme.section("Events", more + theme.table("events", rows[-EVENTS:]))


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _last(values: np.ndarray) -> float:
    return float(_finite(values)[-1]) if np.isfinite(values).any() else math.nan


def _median(values: np.ndarray) -> float:
    return float(np.median(_finite(values))) if np.isfinite(values).any() else math.nan


def _short(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60:.0f} s"
