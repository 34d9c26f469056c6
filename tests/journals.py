"""What a run has written about itself, read back."""

import json
import subprocess
import sys
from pathlib import Path

EXACT = ("step", "tokens", "loss", "lr", "grad_norm", "batch_hash", "val_loss", "val_bits_per_byte")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def journal(run: Path) -> list[dict]:
    return rows_of(run / "metrics.jsonl")


def exact(rows: list[dict]) -> list[tuple]:
    """Of the rows of a journal, what no clock decides."""
    return [tuple(row.get(key) for key in EXACT) for row in rows]


def events(run: Path, kind: str | None = None) -> list[dict]:
    """Its events, or those of a kind."""
    return [row for row in rows_of(run / "events.jsonl") if kind in (None, row["kind"])]


def wandb_records(run: Path) -> list[list[dict]]:
    """What the .wandb files of a run hold, in the order of their writing: [[record, ...] a start]."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()
        found.append([json.loads(line) for line in lines if line.startswith("{")])
    return found


def wandb_history(start: list[dict]) -> list[dict]:
    return [record["history"]["item"] for record in start if record["type"] == "history"]
