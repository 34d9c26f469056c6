"""python tools/predict.py runs/NAME --input new.jsonl --output predicted.jsonl

Applies a fine-tuned run to examples (JSONL, JSON, CSV, Parquet, text, tar), with its best checkpoint: each line of the
output is a row of the input and, under "prediction", what the model says of it. The input has the columns that the run
was trained with, but need not have the right answers; with --score it has them, and how good the predictions are is
printed.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.cli import run_tool
from pretrain.data.tables import read_table
from pretrain.files import write_atomically
from pretrain.predict import Predictor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the fine-tuned run's folder, or one of its checkpoints")
    parser.add_argument("--input", required=True, nargs="+", help="files or folders of examples")
    parser.add_argument("--output", type=Path, help="where the predictions go, as JSONL (default: to the terminal)")
    parser.add_argument("--score", action="store_true", help="the input has the right answers: say how good it is")
    parser.add_argument("--drop-bad", action="store_true", help="with --score, leave out rows without a usable answer")
    parser.add_argument("--batch-size", type=int, default=32, help="examples computed at once (default %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError("--batch-size must be at least 1")
    table = read_table(args.input, "--input")
    predictor = Predictor(args.run, args.precision, args.drop_bad)
    if args.output or not args.score:
        write(predictor, table, args)
    if args.score:
        figures = predictor.figures(table, args.batch_size)
        print(f"{args.run} on {len(table.rows):,} examples of {table.location}")
        for name, value in figures.items():
            print(f"  {name:18} {value:10.4f}")


def write(predictor: Predictor, table, args: argparse.Namespace) -> None:
    """The predictions of all rows, into the file when they are complete, or to the terminal."""
    with tqdm(total=len(table.rows), desc="predicting", unit=" examples") as bar:
        told = predictor.outputs(table, args.batch_size, bar.update)
    lines = "".join(
        json.dumps({**row, "prediction": said}, ensure_ascii=False) + "\n"
        for row, said in zip(table.rows, told, strict=True)
    )
    if args.output:
        write_atomically(args.output, lines.encode())
        print(f"{len(table.rows):,} predictions in {args.output}")
    else:
        sys.stdout.write(lines)


if __name__ == "__main__":
    run_tool(main)
