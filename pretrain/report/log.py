"""What a run tells the world, from rank 0: the journal (the truth), events, the console and Weights & Biases."""

import json
import math
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.config.held_out import by_set
from pretrain.config.schema import LogConfig
from pretrain.files import sync_folder
from pretrain.report.events import told
from pretrain.report.wandb_run import WandbRun

PAUSE_SECONDS = 10  # between two lines where there is no bar
FORETOLD_AFTER = 5  # steps after the first: how long the rest takes is said once


class Log:
    """One per process; on all ranks but the main one every method does nothing.

    Opening it cuts the journal back to the rows with step <= `start_step`, the step that training continues from.
    """

    def __init__(
        self, config: LogConfig, run_dir: Path, total_steps: int, resolved_config: dict[str, Any], start_step: int,
        is_main: bool,
    ) -> None:  # fmt: skip
        self._is_main = is_main
        if not is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._console = _Console(config.console, run_dir.name, total_steps, start_step)
        _drop_torn_line(run_dir / "events.jsonl")
        self._events = open(run_dir / "events.jsonl", "ab")
        self._journal = _Journal(run_dir / "metrics.jsonl", start_step)
        changes = {f"rows_{name}": getattr(self._journal, name) for name in ("cut", "damaged", "missing")}
        if any(changes.values()):
            self.event("journal", step=start_step, **{name: rows for name, rows in changes.items() if rows})
        self._wandb = None
        if config.wandb != "disabled":
            self._wandb = WandbRun(config, run_dir, resolved_config, self.event)
            self._wandb.catch_up(run_dir / "metrics.jsonl", start_step)

    def row(self, row: dict[str, Any]) -> None:
        """Write the metrics of one step; `row["step"]` must be greater than the last one."""
        if not self._is_main:
            return
        self._journal.append(row)
        self._console.show(row)
        if self._wandb:
            self._wandb.send(row)

    def event(self, kind: str, **facts: Any) -> None:
        """Append to events.jsonl what happened and why, and print it."""
        if not self._is_main:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._events.write(_json_line({"time": now, "kind": kind, **facts}))
        self._events.flush()
        if self._console.enabled:
            words = told({"kind": kind, **_plain(facts)})
            self._console.say(f"{kind}: {words}" if words else kind)

    def say(self, text: str) -> None:
        """Print above the progress bar, also where the console is off."""
        if self._is_main:
            self._console.say(text)

    def doing(self, what: str) -> None:
        """Say what takes its time between two steps, or after the last one."""
        if self._is_main:
            self._console.doing(what)

    def sync(self) -> None:
        """Wait until the journal is on the disk: a checkpoint must not outlive the rows that led to it."""
        if self._is_main:
            os.fsync(self._journal.file.fileno())

    def close(self, **summary: Any) -> None:
        """End the bar and W&B; `summary` becomes the W&B run's summary. Closing twice is harmless."""
        if not self._is_main:
            return
        if self._wandb:
            self.doing("W&B finishes")
            self._wandb.finish(summary)
            self._wandb = None
        self._console.close()
        self._journal.file.close()
        self._events.close()


class _Journal:
    """metrics.jsonl, a line of JSON a step. Counts the rows that opening it dropped (`cut`, `damaged`), or misses."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.cut = self.damaged = self._last_step = 0
        kept = self._repair(path, start_step)
        self.missing = max(start_step - kept, 0)
        self._last_step = max(self._last_step, start_step)
        self.file = open(path, "ab")

    def _repair(self, path: Path, start_step: int) -> int:
        """Keep the whole rows up to `start_step`, through a temporary file and a rename; returns how many they are."""
        if not path.exists():
            return 0
        kept, tmp = 0, path.with_suffix(".jsonl.tmp")
        with open(path, "rb") as old, open(tmp, "wb") as new:
            for line in old:
                step = _step_of(line)
                if step is None or step <= self._last_step:
                    self.damaged += 1
                elif step > start_step:
                    self.cut += 1
                else:
                    self._last_step, kept = step, kept + 1
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        if self.cut or self.damaged:
            os.replace(tmp, path)
            sync_folder(path.parent)
        else:
            tmp.unlink()
        return kept

    def append(self, row: dict[str, Any]) -> None:
        assert row["step"] > self._last_step, f"step {row['step']} comes after step {self._last_step}"
        self._last_step = row["step"]
        self.file.write(_json_line(row))
        self.file.flush()


class _Console:
    """A tqdm bar on a terminal; elsewhere (a log file, Slurm) a plain line now and then. Other lines go to stdout."""

    def __init__(self, enabled: bool, label: str, total_steps: int, start_step: int) -> None:
        self.enabled = enabled
        self._label = label
        self._total_steps = total_steps
        self._opened = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # (step, time) that the time left is measured from
        self._bar = None
        if enabled and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(
                total=total_steps, initial=start_step, desc=label, unit="step", dynamic_ncols=True, miniters=1,
                mininterval=0.2, bar_format=form,
            )  # fmt: skip

    def show(self, row: dict[str, Any]) -> None:
        """Show the figures of a step; those of an evaluation get a line of their own."""
        if not self.enabled:
            return
        if told := _validation(row):
            self.say(f"step {row['step']:,}: validation {told}")
        self._foretell(row["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(row), refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        else:
            self._show_plain(row)

    def _foretell(self, step: int) -> None:
        """Say once, after the first steps, how long a run of minutes or more will take on this machine."""
        if self._first is None:
            self._first = (step, time.monotonic())  # the first step warms up: it would spoil the estimate
        elif step == self._first[0] + FORETOLD_AFTER and self._seconds_left(step) >= 60:
            steps, left = self._total_steps - step, tqdm.format_interval(self._seconds_left(step))
            self.say(f"{self._label}: the {steps:,} steps that are left take about {left} on this machine")

    def _seconds_left(self, step: int) -> float:
        """By the speed since the first step; 0 where that is not known, or nothing is left."""
        first, started = self._first
        per_step = (time.monotonic() - started) / (step - first) if step > first else 0.0
        return per_step * (self._total_steps - step)

    def _show_plain(self, row: dict[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        # Ever rarer, so that the log of a week's run stays short.
        pause = max(PAUSE_SECONDS, min(300, (now - self._opened) / 20))
        if step > self._first[0] and now - self._printed < pause and step < self._total_steps:
            return
        self._printed = now
        seconds = self._seconds_left(step)
        left = f", {tqdm.format_interval(seconds)} left" if seconds > 0 else ""
        percent = 100 * step // max(self._total_steps, 1)
        head = f"{self._label} {percent:3d}% step {step:,}/{self._total_steps:,}"
        print(f"{head}: {_figures(row)}{left}", file=sys.stderr, flush=True)

    def doing(self, what: str) -> None:
        """Show it in the place of the figures until the next ones; in a log file, if its last line is a while ago."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)
        elif self.enabled and time.monotonic() - self._printed >= PAUSE_SECONDS:
            self._printed = time.monotonic()
            print(f"{self._label}: {what}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _validation(row: dict[str, Any]) -> str:
    """The figures of an evaluation: those of each held-out set after its name, where it has one."""
    told = []
    for name, columns in by_set(row).items():
        figures = {figure.replace("_", " "): row[column] for figure, column in columns.items()}
        if listed := ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items() if value is not None):
            told.append(f"{name} {listed}".lstrip())
    return "; ".join(told)


def _figures(row: dict[str, Any]) -> str:
    """Loss, speed and MFU, those that the row has."""
    forms = {"loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}
    return ", ".join(form.format(row[name]) for name, form in forms.items() if row.get(name) is not None)


def _json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What any JSON reader accepts: numbers of numpy and torch become Python's, non-finite ones null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _step_of(line: bytes) -> int | None:
    """The step of a journal line; None where the line is torn or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row["step"] if isinstance(row, dict) and type(row.get("step")) is int else None


def _drop_torn_line(path: Path) -> None:
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
