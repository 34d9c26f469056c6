"""python tools/show_batches.py runs/NAME --step 100 [--rank 0 --world 2] [--rows 4]

The text of the batch that a step of a run trains on, past or future, and where each row comes from: source, epoch,
shard, chunk, and the row in the shard. Nothing is trained and no GPU is needed. Steps count from 1, as in the journal,
and the hash is the journal's `batch_hash`.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from pretrain.checkpoint.load import read_header, run_of
from pretrain.checkpoint.manifest import committed
from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.files import read_lines
from pretrain.stream import opening
from pretrain.stream.stream import Rows, Stream, batch_hash
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--step", type=int, required=True, help="the step that trains on the batch, from 1 on")
    parser.add_argument("--rank", type=int, help="only the rows of this rank of --world")
    parser.add_argument("--world", type=int, default=1, help="how many ranks share the batch (default %(default)s)")
    parser.add_argument("--rows", type=int, default=0, help="show this many rows (default: all)")
    parser.add_argument("--characters", type=int, default=400, help="of each row; 0: all (default %(default)s)")
    args = parser.parse_args(argv)
    if args.step < 1 or args.world < 1 or not 0 <= (args.rank or 0) < args.world:
        parser.error("--step and --world count from 1, --rank from 0 to one below --world")
    folder = run_of(args.run)
    stream = open_stream(args.run)
    phase = stream.phase_of_step(args.step - 1)
    if phase.global_batch_size % args.world:
        raise ValueError(f"--world {args.world} does not divide the global batch of {phase.global_batch_size} samples")
    rows = stream.rows(stream.numbers(args.step - 1))
    print(f"{folder}, step {args.step}: {phase.global_batch_size} rows of {phase.seq_len} tokens, "
          f"{compare(folder, args.step, rows.digests())}")  # fmt: skip
    wanted = np.arange(args.rank or 0, len(rows.tokens), args.world if args.rank is not None else 1)
    places = stream.places(rows.sample_numbers)
    tokenizer = load_tokenizer(folder)
    for row in wanted[: args.rows or None].tolist():
        show(row, rows, places[row], tokenizer, args.characters)


def open_stream(run: Path) -> Stream:
    """The stream of a run as one rank, with the phases and quarantine of its newest checkpoint (or the one named)."""
    folder = run_of(run)
    cfg = compose.read(folder / "config.yaml")
    if cfg.task is not None:
        raise ValueError(f"{folder} was fine-tuned on examples, and here the rows of shards are shown: give a run of "
                         "pretrain.train")  # fmt: skip
    stream = opening.open_training(cfg.data, cfg.train, cfg.seed, opening.open_sources(cfg.data), 0, 1)
    if newest := [run] if run != folder else committed(run / "checkpoints"):
        header = read_header(newest[0])
        stream.resume(header.state, header.step)
    return stream


def compare(folder: Path, step: int, digests: np.ndarray) -> str:
    """The hash of a batch in words, beside the journal's when the step is done, by this version or an earlier one."""
    found, earlier = batch_hash(digests), hashlib.sha256(digests.tobytes()).hexdigest()[:16]
    journal = read_lines(folder / "metrics.jsonl")
    recorded = next((row["batch_hash"] for row in journal if row["step"] == step), None)
    if recorded is None:
        return f"batch hash {found} (not trained on yet)"
    is_same = recorded in (found, earlier)
    return f"batch hash {found} ({'as in the journal' if is_same else 'the journal has ' + recorded})"


def show(row: int, rows: Rows, place: dict, tokenizer: Tokenizer, characters: int) -> None:
    """One row: where it comes from, and its text with the special pieces left out."""
    tokens, targets = rows.tokens[row, :-1], int(rows.is_target[row].sum())
    chunks = ", ".join(f"{chunk:08d}" for chunk in place["chunks"])
    print(f"\nrow {row}, sample {rows.sample_numbers[row]}, {targets} targets: {place['source']}, "
          f"epoch {place['epoch']}, {place['shard']}, chunk {chunks}, row {place['row']} of the shard")  # fmt: skip
    for start, end in documents(tokens, tokenizer):
        text = tokenizer.decode(tokens[start:end].tolist())
        cut = text[:characters] + " ..." if characters and len(text) > characters else text
        print("  | " + cut.replace("\n", "\n  | "))


def documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Where the documents of a row begin and end, by their last token."""
    starts = [0, *(np.flatnonzero(tokens[:-1] == tokenizer.suffix[-1]) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


if __name__ == "__main__":
    run_tool(main)
