"""python tools/report.py runs/NAME

Writes a run's report.html anew, from what the run has written so far.
"""

import argparse
from pathlib import Path

from pretrain.cli import run_tool
from pretrain.report import write_report


def main(argv: list[str] | None = None) -> None:
    """Write the report of each run named and print where it is."""
    parser = argparse.ArgumentParser(
        description="Write report.html into a run's folder: curves, figures, sample text, events, configuration.",
        epilog="example: python tools/report.py runs/quickstart",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, finished or not")
    runs = parser.parse_args(argv).runs
    for run in runs:
        if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl")):
            raise ValueError(f"{run} holds neither config.yaml nor metrics.jsonl: name a run's folder (runs/NAME)")
    for run in runs:
        print(write_report(run))


if __name__ == "__main__":
    run_tool(main)
