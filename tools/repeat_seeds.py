"""python tools/repeat_seeds.py --seeds 0 1 2 --test test.jsonl -- launch/finetune.sh task=... run.name=mood

Runs a fine-tuning command once for each seed, as runs mood-seed0, mood-seed1, ..., and prints the mean and the spread
(sample standard deviation) of each figure: of the best evaluation, and with --test on examples that no run has seen.
Started again, it continues what was interrupted. The figures are also written to mood-seeds.json beside the runs.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from pretrain.cli import STOPPED, child, run_tool, stops_as_ctrl_c
from pretrain.examples.tables import read_table
from pretrain.files import RESULT, write_atomically
from pretrain.predict import Predictor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--test", nargs="+", help="examples to judge each run's best checkpoint on")
    parser.add_argument("--drop-bad", action="store_true", help="leave out rows of --test without a usable answer")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="the command, with run.name=NAME")
    args = parser.parse_args(argv)
    name, root = setting(args.command, "run.name"), setting(args.command, "run.root", "runs")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} has a seed twice")
    table = read_table(args.test, "--test") if args.test else None
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        run = Path(root) / f"{name}-seed{seed}"
        print(f"== {run}", flush=True)
        train([*args.command, f"seed={seed}", f"run.name={run.name}"], run)
        figures = result_of(run)
        if table:
            tested = Predictor(run, overrides=["task.drop_bad=true"] * args.drop_bad).figures(table, batch_size=32)
            figures |= {f"test_{figure}": value for figure, value in tested.items()}
        for figure, value in figures.items():
            found.setdefault(figure, []).append(value)
    path = Path(root) / f"{name}-seeds.json"
    write_atomically(path, json.dumps({"seeds": args.seeds, "figures": found}, indent=1).encode())
    print(f"== {name}, {len(args.seeds)} seeds ({path})")
    for figure, values in found.items():
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"  {figure:22} {statistics.mean(values):.4f}{spread}   ({', '.join(f'{v:.4f}' for v in values)})")


def train(command: list[str], run: Path) -> None:
    """Run a command to the end of its training. A signal is passed on and waited for: the run saves before it stops."""
    with stops_as_ctrl_c(), child(command, lambda process: process.terminate()) as process:
        process.wait()
    if process.returncode == STOPPED:
        print(f"{run} was stopped before its end: the same command goes on from there", file=sys.stderr)
    if process.returncode:
        sys.exit(process.returncode)


def setting(command: list[str], key: str, default: str = "") -> str:
    """What a command line says of a key."""
    said = [word.partition("=")[2] for word in command if word.startswith(f"{key}=")]
    if not said and not default:
        raise ValueError(f"the command has no {key}=...: add it, the runs are named after it")
    return said[-1] if said else default


def result_of(run: Path) -> dict[str, float]:
    """The figures of a run's best evaluation; none without data.val."""
    path = run / RESULT
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}
    return {name: value for name, value in figures.items() if value is not None}


if __name__ == "__main__":
    run_tool(main, tells=True, kept="what was trained and saved stays")
