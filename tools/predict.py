"""python tools/predict.py runs/NAME --input new.jsonl --output predicted.jsonl

Applies a fine-tuned run (its best checkpoint), or an imported model with a head for a task, to examples (JSONL, JSON,
CSV, Parquet, text, tar): each line of the output is a row of the input and, under "prediction", what the model says of
it. The input has the columns that the run was trained with, or those that KEY=VALUE names (task.text=body, see
conf/task/_base.yaml), but need not have the right answers; with --score it has them, and how good the predictions are
is printed.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.cli import run_tool
from pretrain.examples.tables import Table, plain, read_table
from pretrain.files import check_output, write_output
from pretrain.predict import Predictor

COLUMN = "prediction"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RUN [task.KEY=VALUE ...] --input FILE [FILE ...] [options]",
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="a fine-tuned run or one of its checkpoints, an imported "
                        "model, or a Hugging Face folder")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of its task, right after RUN")
    parser.add_argument("--input", required=True, nargs="+", help="files or folders of examples")
    parser.add_argument("--output", type=Path, help="where the predictions go, as JSONL (default: to the terminal)")
    parser.add_argument("--score", action="store_true", help="the input has the right answers: say how good it is; "
                        "task.drop_bad=true leaves out rows without a usable one")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="examples computed at once (default %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError("--batch-size must be at least 1")
    check_output(args.output)
    table = read_table(args.input, "--input")
    writes = args.output or not args.score
    if writes and COLUMN in table.columns:
        raise ValueError(f"{table.location} has a column {COLUMN!r} already: rename it")
    predictor = Predictor(args.run, args.precision, args.overrides)
    judged = None if writes else predictor.judged(table, args.batch_size)
    if writes:
        with tqdm(total=len(table.rows), desc="predicting", unit=" examples") as bar:
            if args.score:
                told, *judged = predictor.told_and_judged(table, args.batch_size, bar.update)
            else:
                told = predictor.outputs(table, args.batch_size, bar.update)
        write(told, table, args)
    if judged:
        print(f"{args.run} on {table.location}")
        tell(*judged)


def tell(figures: dict[str, float], of_each: list[dict]) -> None:
    """The figures, and those of each label."""
    for name, value in figures.items():
        print(f"  {name:18} {value:10.4f}")
    if of_each:
        print(f"  {'label':18} {'precision':>10} {'recall':>10} {'f1':>10} {'support':>10}")
    for row in of_each:
        values = "".join(f" {row[name]:10.4f}" for name in ("precision", "recall", "f1"))
        print(f"  {row['label']:18}{values} {row['support']:10,}")


def write(told: list[dict], table: Table, args: argparse.Namespace) -> None:
    """The predictions of all rows, into the file, or to the terminal."""
    lines = "".join(
        json.dumps({**plain(row), COLUMN: said}, ensure_ascii=False) + "\n"
        for row, said in zip(table.rows, told, strict=True)
    )
    if args.output:
        write_output(args.output, lines.encode())
        print(f"{len(table.rows):,} predictions in {args.output}")
    else:
        sys.stdout.write(lines)


if __name__ == "__main__":
    run_tool(main, kept="no predictions were written")
