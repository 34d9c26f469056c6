"""What a run has written about itself, read back."""

import json
from pathlib import Path


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def journal(run: Path) -> list[dict]:
    return rows_of(run / "metrics.jsonl")


def events(run: Path, kind: str | None = None) -> list[dict]:
    """Its events, or those of a kind."""
    return [row for row in rows_of(run / "events.jsonl") if kind in (None, row["kind"])]
