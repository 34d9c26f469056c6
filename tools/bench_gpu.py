"""python tools/bench_gpu.py [PIECE ...] [--device cuda] [--limit 90] [--minutes 8] [--output FILE]

Checks and measures what only a GPU can, on one card (`tools/bench.py gpu` is the same). It is done in pieces, each a
process of its own: one that fails, hangs or is killed is a line of the table, and the others have theirs.
Nothing is downloaded. Exit code 1: a check failed.

    device                    which is chosen, its precision, its peak
    collectives               the process group: NCCL for its tensors, gloo for the host's
    attention                 the fused kernels against the formula, and which of them torch takes
    zero0 zero1 zero2 zero3   a step in fp32 against torch alone on the CPU; the most memory against show_model's figure
    curve                     losses in bf16 beside those in fp32
    resume                    saved, loaded and gone on from: the same bits
    124M 1B 8B                tokens a second, MFU and memory, of 8B a few layers

`--device cpu` does the same on tiny shapes, to try the command out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.cli import FAILED, FINISHED, child, run_tool
from pretrain.files import check_output, write_atomically

PIECES = (
    "device", "collectives", "attention", "zero0", "zero1", "zero2", "zero3", "curve", "resume", "124M", "1B", "8B",
)  # fmt: skip
PROGRAM = Path(__file__).with_name("bench_gpu_pieces.py")
LOG_KEPT = 4000  # characters of what a piece that failed has printed
ITSELF = "the piece itself"  # what a row is about that says how a piece ended
VERDICTS = {True: "ok", False: "FAILED", None: ""}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="which to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--limit", action="append", default=[], metavar="[PIECE=]SECONDS",
                        help="the most that a piece may take, or this one (default: 90)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="the most for all together (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_gpu.json"), help="default: %(default)s")
    args = parser.parse_args(argv)
    pieces = args.pieces or PIECES
    limits = dict.fromkeys(PIECES, 90.0) | limits_of(args.limit)
    if unknown := [name for name in pieces if name not in PIECES]:
        raise ValueError(f"{unknown[0]} is no piece; these are: {', '.join(PIECES)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.output)
    started, rows = time.monotonic(), []
    for piece in pieces:
        left = 60 * args.minutes - (time.monotonic() - started)
        for row in rows_of(piece, args.device, min(limits[piece], left), left):
            rows.append(row)
            print(line_of(row), flush=True)
        result = {"device": args.device, "seconds": time.monotonic() - started, "rows": rows}
        write_atomically(args.output, json.dumps(result, indent=1).encode())  # whatever ends the next piece
    failed = sum(row["passed"] is False for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {time.monotonic() - started:.0f} s; all figures: {args.output}")
    sys.exit(FAILED if failed else FINISHED)


def limits_of(said: list[str]) -> dict[str, float]:
    """`--limit` as given -> the seconds of each piece that it names, or of all."""
    found: dict[str, float] = {}
    for text in said:
        name, _, seconds = text.rpartition("=")
        if name and name not in PIECES:
            raise ValueError(f"--limit {text}: {name} is no piece; these are: {', '.join(PIECES)}")
        try:
            found |= dict.fromkeys([name] if name else PIECES, float(seconds))
        except ValueError:
            raise ValueError(f"--limit {text} is no number of seconds: write 90, or 8B=120") from None
    return found


def rows_of(piece: str, device: str, limit: float, left: float) -> Iterator[dict[str, Any]]:
    """Run a piece; what it found, and how it ended where that was not well."""
    if left <= 0:
        yield row_of(piece, "not begun: the time of all together is over (--minutes)")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        ended, log = run([sys.executable, str(PROGRAM), piece, "--device", device, "--rows", str(rows)], device, limit)
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    found = [json.loads(line) | {"piece": piece} for line in lines if line.endswith("}")]  # but for one cut short
    if ended and not (found and found[-1]["what"] == ITSELF):
        found.append(row_of(piece, ended))
    if ended:
        found[-1]["facts"]["log"] = log
    yield from found


def row_of(piece: str, found: str) -> dict[str, Any]:
    return {"piece": piece, "what": ITSELF, "passed": False, "found": found, "facts": {}}


def run(command: list[str], device: str, limit: float) -> tuple[str | None, str]:
    """Run a command for at most `limit` seconds; how it ended, None where well, and the end of what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryFile() as log:
        options = {"env": environment, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        with child(command, end, start_new_session=True, **options) as process:
            try:
                ended = ending(process.wait(max(limit, 0)))
            except subprocess.TimeoutExpired:
                ended = f"not done within {limit:.0f} s, and ended (--limit, --minutes)"
                end(process)
                process.wait()
        log.seek(0)
        return ended, log.read().decode(errors="replace")[-LOG_KEPT:]


def end(process: subprocess.Popen) -> None:
    """Kill a piece with what it has started; it leads a group of its own."""
    os.killpg(process.pid, signal.SIGKILL)


def ending(code: int) -> str | None:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else None


def line_of(row: dict[str, Any]) -> str:
    return f"{VERDICTS[row['passed']]:7}{row['piece']:12}{row['what']:40}{row['found']}"


if __name__ == "__main__":
    run_tool(main)
