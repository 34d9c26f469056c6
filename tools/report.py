"""python tools/report.py runs/NAME

Writes a run's report.html anew, from what the run has written so far.
"""

import argparse
import statistics
from pathlib import Path

from pretrain.cli import run_tool
from pretrain.config.held_out import text_of
from pretrain.files import EVALUATION, RESULT, read_lines, read_object
from pretrain.report.page import write_report
from pretrain.report.theme import words


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
        print(headline(run))
        print(f"  report: {write_report(run)}")


def headline(run: Path) -> str:
    """The run in a few lines: how far, how good, how fast (medians over the steps), against which peak."""
    rows, events = (list(read_lines(run / name)) for name in ("metrics.jsonl", "events.jsonl"))
    if not rows:
        return f"{run}: no step yet"
    speed, mfu = (statistics.median(row[key] for row in rows) for key in ("tokens_per_second", "mfu"))
    loss = "not finite" if rows[-1]["loss"] is None else f"{rows[-1]['loss']:.3f}"
    lines = [
        f"{run}: step {rows[-1]['step']}, {rows[-1]['tokens']:,} tokens, loss {loss}",
        f"  {speed:,.0f} tokens/s, MFU {mfu:.1%}",
    ]
    starts = [event for event in events if "peak_tflops" in event]
    if starts:
        lines[-1] += f" of {starts[-1]['peak_tflops']:.3g} TFLOP/s ({starts[-1]['peak_source']})"
    result = read_object(run / EVALUATION)
    text = text_of(result)
    if "text_bytes" in result:
        others = ", ".join(f"{name} {result[name + '_bits_per_byte']:.3f}" for name in ("unigram", "gzip", "xz"))
        lines.append(f"  {result['val_bits_per_byte']:.3f} bits per byte on {text} ({others})")
    elif "unigram_loss" in result:
        right = f", {result['val_accuracy']:.1%} of masked tokens right" if "val_accuracy" in result else ""
        unigram = f"unigram {result['unigram_loss']:.3f}"
        lines.append(f"  {result['val_loss']:.3f} nats a token on {text} ({unigram}{right})")
    if best := read_object(run / RESULT):
        lines.append(f"  best {words(best['metric'])} {best['best']:.4g}, at step {best['step']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main, tells=True, kept="reports that were written stay")
