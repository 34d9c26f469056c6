"""A run's folder -> one self-contained report.html: headline figures, curves, sample text, events, config, environment.

Works at any moment of a run, with whatever files exist. The only module that imports matplotlib.
"""

import html
import io
import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

POINTS = 1000  # a curve; more would only make the file heavy
EVENTS = 200
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")
COLUMNS = (
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_seconds", "val_loss",
    "val_bits_per_byte", "val_accuracy",
)  # fmt: skip
# Drawn in these colours, which the style sheet's variables then replace, so that curves follow the reader's theme.
INK, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
THEME = {INK: "var(--muted)", GRID: "var(--line)", FIRST: "var(--accent)", SECOND: "var(--second)"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the run has written so far, and return its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: name a run's folder (runs/NAME)")
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    config_text = _read_text(run_dir / "config.yaml")
    body = [
        _header(run_dir.resolve().name, metrics, _total_steps(config_text)),
        _tiles(metrics),
        _curves(metrics),
        _samples(list(_json_lines(run_dir / "samples.jsonl"))),
        _events(list(_json_lines(run_dir / "events.jsonl"))),
        _details("Configuration", f"<pre>{_esc(config_text)}</pre>" if config_text else ""),
        _details("Evaluation on all held-out text", _facts(_read_text(run_dir / "evaluation.json"))),
        _details("Environment", _facts(_read_text(run_dir / "environment.json"))),
    ]
    page = PAGE.format(title=_esc(run_dir.resolve().name), style=CSS, body="\n".join(part for part in body if part))
    path, tmp = run_dir / "report.html", run_dir / "report.html.tmp"
    tmp.write_text(page, encoding="utf-8")
    os.replace(tmp, path)
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that is being written, or damaged, is passed over."""
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """{column: float64[rows]}; NaN stands for what a row lacks."""
    columns = {name: array("d") for name in COLUMNS}
    for row in _json_lines(path):
        for name, column in columns.items():
            value = row.get(name)
            column.append(value if type(value) in (int, float) else math.nan)
    return {name: np.array(column, dtype=np.float64) for name, column in columns.items()}


def _total_steps(config_text: str) -> int | None:
    try:
        return int(yaml.safe_load(config_text)["train"]["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _header(name: str, metrics: dict[str, np.ndarray], total_steps: int | None) -> str:
    step, seconds = _last(metrics["step"]), np.nansum(metrics["step_seconds"])
    of_total = f" of {total_steps:,}" if total_steps else ""
    facts = [f"step {step:,.0f}{of_total}" if math.isfinite(step) else "no step yet"]
    facts.append(f"{_duration(seconds)} of training" if seconds else "")
    facts.append(f"written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")
    return f"<header><h1>{_esc(name)}</h1><p>{' · '.join(_esc(fact) for fact in facts if fact)}</p></header>"


def _tiles(metrics: dict[str, np.ndarray]) -> str:
    """The headline figures; speeds are medians, so that a slow start or a pause does not count."""
    tiles = []

    def tile(label: str, value: float, form: str, note: str = "") -> None:
        if math.isfinite(value):
            tiles.append(f"<div><dt>{label}</dt><dd>{form.format(value)}</dd><small>{note}</small></div>")

    names = ("loss", "val_loss", "val_bits_per_byte", "val_accuracy")
    loss, val_loss, bits, accuracy = (_finite(metrics[name]) for name in names)
    tail = max(1, min(50, loss.size // 20))
    if loss.size:
        tile("Training loss", loss[-tail:].mean(), "{:.3f}", f"mean of the last {tail}" if tail > 1 else "last step")
    if val_loss.size:
        tile("Validation loss", val_loss[-1], "{:.3f}", f"best {val_loss.min():.3f}")
    if bits.size:
        tile("Bits per byte", bits[-1], "{:.3f}", f"validation, best {bits.min():.3f}")
    if accuracy.size:
        tile("Accuracy", accuracy[-1], "{:.1%}", f"of masked tokens, best {accuracy.max():.1%}")
    tile("Tokens per second", _median(metrics["tokens_per_second"]), "{:,.0f}", "median")
    tile("MFU", _median(metrics["mfu"]), "{:.1%}", "median")
    tokens = _last(metrics["tokens"])
    tile("Tokens seen", tokens, _short(tokens), f"{tokens:,.0f}")
    return f"<dl>{''.join(tiles)}</dl>" if tiles else "<p>No step has been logged yet.</p>"


def _curves(metrics: dict[str, np.ndarray]) -> str:
    panels = [
        _panel("Loss", metrics, [("loss", "training"), ("val_loss", "validation")]),
        _panel("Validation bits per byte", metrics, [("val_bits_per_byte", "")]),
        _panel("Validation accuracy", metrics, [("val_accuracy", "")]),
        _panel("Learning rate", metrics, [("lr", "")]),
        _panel("Gradient norm", metrics, [("grad_norm", "")]),
        _panel("Tokens per second", metrics, [("tokens_per_second", "")]),
        _panel("MFU", metrics, [("mfu", "")]),
    ]
    return f'<section class="curves">{"".join(panels)}</section>' if any(panels) else ""


def _panel(title: str, metrics: dict[str, np.ndarray], lines: list[tuple[str, str]]) -> str:
    """One figure of (column, label) curves over the steps; nothing where no column has a number."""
    curves = [(name, label, *_thin(metrics["step"], metrics[name])) for name, label in lines]
    curves = [curve for curve in curves if curve[2].size]
    if not curves:
        return ""
    svg = _draw(title, curves)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"| id="[A-Za-z0-9.]+_\d+"|font-family: [^;]*; ', "", svg)
    # A hundredth of a point is enough, and halves the page. Only in attributes: labels keep their digits.
    svg = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]), svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_esc(title)}"', 1)
    return f"<figure><figcaption>{_esc(title)}</figcaption>{svg}</figure>"


def _draw(title: str, curves: list[tuple]) -> str:
    """SVG text of curves (column, label, x, mean, low, high); noisy ones pale behind their running mean."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, label, x, mean, low, high) in zip((FIRST, SECOND), curves, strict=False):
            if name in NOISY and x.size > 100:
                if low is not high:
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(x, mean, color=colour, alpha=0.35, linewidth=0.7)
                mean = _running_mean(mean, x.size // 50)
            axes.plot(x, mean, color=colour, linewidth=1.5, marker="o" if x.size <= 40 else "", ms=3, label=label)
        axes.grid(color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, 1.02 * max(1, *(x[-1] for _, _, x, *_ in curves)))
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        percent = PercentFormatter(1.0)
        formats = {"mfu": percent, "val_accuracy": percent, "lr": "{x:.2g}", "tokens_per_second": EngFormatter(sep="")}
        if (name := curves[0][0]) in formats:
            axes.yaxis.set_major_formatter(formats[name])
            axes.set_ylim(bottom=0)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True)
    return svg.getvalue()


def _running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Mean of each value and as many neighbours on either side, fewer towards the ends, so that slopes stay put."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    half = np.minimum(half_width, np.minimum(at, values.size - 1 - at))
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _thin(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(step, mean, least, greatest) of at most `POINTS` runs of rows, those without a number left out."""
    good = np.isfinite(step) & np.isfinite(value)
    x, y = step[good], value[good]
    if x.size <= POINTS:
        return x, y, y, y
    starts = np.linspace(0, x.size, POINTS, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, x.size))
    means = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return *means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _samples(samples: list[dict[str, Any]]) -> str:
    """The newest texts the model wrote, the prompt set apart."""
    blocks = []
    for sample in samples[:-4:-1]:
        prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        text = text[len(prompt) :] if prompt and text.startswith(prompt) else text
        blocks.append(f"<h3>step {_esc(sample.get('step'))}</h3><pre><b>{_esc(prompt)}</b>{_esc(text)}</pre>")
    return f"<section><h2>What the model writes</h2>{''.join(blocks)}</section>" if blocks else ""


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event in events[-EVENTS:]:
        facts = ", ".join(f"{key} {_brief(value)}" for key, value in event.items() if key not in ("time", "kind"))
        when = str(event.get("time", ""))[:19].replace("T", " ")
        cells = (f"<time>{_esc(when)}</time>", f"<b>{_esc(event.get('kind'))}</b>", _esc(facts))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    more = f"<p>The last {EVENTS} of {len(events):,}.</p>" if len(events) > EVENTS else ""
    return f'<section><h2>Events</h2>{more}<div class="wide"><table>{"".join(rows)}</table></div></section>'


def _facts(text: str) -> str:
    """A JSON object as a table; any other text as it is."""
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        return f"<pre>{_esc(text)}</pre>" if text.strip() else ""
    rows = "".join(f"<tr><td>{_esc(key)}</td><td>{_esc(_brief(value))}</td></tr>" for key, value in facts.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _brief(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


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


def _esc(value: Any) -> str:
    return html.escape(str(value))


CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #ffffff; --ink: #1c1e21; --muted: #6a6f76;
  --line: #e4e4df; --accent: #2456c7; --second: #d2571e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1b1e23; --ink: #e6e6e3; --muted: #969ba3;
  --line: #2f343b; --accent: #7aa7ff; --second: #ff9d66; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.15rem } h3 { margin: 1rem 0 .35rem; font-size: .85rem; color: var(--muted) }
header p, small, time { color: var(--muted) } header p { margin: .35rem 0 0 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 1.75rem 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
dl > div { padding: .9rem 1.1rem; background: var(--card) } dt { font-size: .8rem; color: var(--muted) }
dd { margin: .1rem 0 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .9rem 1rem .5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px }
figcaption { margin-bottom: .4rem; font-size: .9rem; font-weight: 600 }
svg { display: block; width: 100%; height: auto; font-family: inherit }
pre { margin: 0; padding: .9rem 1.1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere } pre b { color: var(--accent) }
.wide { overflow-x: auto } table { width: 100%; border-collapse: collapse; font-size: .88rem }
td { padding: .4rem 1rem .4rem 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td:first-child { white-space: nowrap } td:last-child { width: 100% }
tr:first-child td { border-top: 0 } td b { white-space: nowrap }
details { margin-top: 1.25rem } summary { cursor: pointer; padding: .3rem 0; font-size: 1.15rem; font-weight: 600 }
details > :last-child { margin-top: .5rem }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
