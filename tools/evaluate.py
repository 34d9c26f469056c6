"""python tools/evaluate.py runs/NAME [--data SHARDS]

Bits per byte of a run's newest checkpoint on its whole validation shards, beside a unigram model (token frequencies of
the training shards), gzip -9 and xz -9 on the same text. Of a masked model: loss and accuracy on the masked tokens of
these shards, masked as in training, beside the unigram model's loss on the same tokens. The result is also written to
runs/NAME/evaluation.json.
"""

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pretrain import checkpoint, compose, dist, hardware
from pretrain.cli import run_tool
from pretrain.data import opening
from pretrain.data.objectives import IGNORE, MaskedLM, make_objective
from pretrain.data.stream import Rows, Stream
from pretrain.data.tokenizer import Tokenizer, load_tokenizer
from pretrain.evaluate import Validation

READ_AT_ONCE = 256  # windows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--data", help="validation shards (default: the run's data.val)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: %(default)s")
    args = parser.parse_args(argv)
    folder = checkpoint.run_of(args.run)
    cfg = compose.read(folder / "config.yaml")
    if not (args.data or cfg.data.val):
        raise ValueError(f"{folder} was trained without data.val: name validation shards with --data")
    tokenizer = load_tokenizer(folder)
    objective = make_objective(cfg.objective, tokenizer, cfg.seed)
    where = (cfg.data, cfg.train.seq_len, tokenizer)
    held_out = opening.open_held_out(args.data or cfg.data.val, *where)
    training = [opening.open_held_out(source, *where, "train") for source in cfg.data.sources]

    result = {"step": checkpoint.read_header(checkpoint.newest(args.run)).step, "windows": held_out.epoch_samples}
    result |= evaluate_model(args.run, held_out, tokenizer, objective, args.precision)
    counts = sum(np.bincount(tokens, minlength=tokenizer.vocab_size) for stream in training for tokens in parts(stream))
    if "val_bits_per_byte" in result:
        result |= text_baselines(held_out, tokenizer, counts)
    else:
        result |= token_baseline(held_out, tokenizer, objective, counts)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    show(result, folder)


def evaluate_model(run: Path, held_out: Stream, tokenizer: Tokenizer, objective, precision: str) -> dict[str, float]:
    """What `Validation` says over all windows, with a progress bar."""
    device = dist.start(dist.ALONE)
    dtype = torch.bfloat16 if hardware.resolve_precision(precision, device) == "bf16" else torch.float32
    model = checkpoint.load_model(run).to(device, dtype)
    validation = Validation(held_out, objective, 0, 16, tokenizer.byte_lengths())
    with tqdm(total=held_out.epoch_samples, desc="evaluating", unit=" windows") as bar, torch.no_grad():

        def evaluate(score_rows: Callable, *batch: torch.Tensor) -> torch.Tensor:
            bar.update(len(batch[0]))
            return score_rows(model, *batch).double().cpu()

        return validation.run(evaluate, dist.ALONE, device)


def text_baselines(held_out: Stream, tokenizer: Tokenizer, counts: np.ndarray) -> dict[str, float]:
    """Bits per byte of the unigram model and of two compressors on the text of all windows."""
    ids = np.concatenate(list(parts(held_out)))
    text = tokenizer.decode(ids.tolist()).encode()
    return {
        "text_bytes": len(text),
        "unigram_bits_per_byte": unigram_bits(counts, ids) / len(text),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def token_baseline(held_out: Stream, tokenizer: Tokenizer, objective, counts: np.ndarray) -> dict[str, float]:
    """The unigram model's nats a target, among the tokens that can be one: special ones are never masked."""
    labels = np.concatenate([objective(rows)[1].ravel() for rows in all_rows(held_out)])
    ids = labels[labels != IGNORE]
    special = list(tokenizer.special_ids.values()) if isinstance(objective, MaskedLM) else []
    possible = np.setdiff1d(np.arange(tokenizer.vocab_size), special)
    bits = unigram_bits(counts[possible], np.searchsorted(possible, ids))
    return {"targets": len(ids), "unigram_loss": bits * math.log(2) / max(len(ids), 1)}


def all_rows(stream: Stream) -> Iterator[Rows]:
    """All windows of a stream, in order, some at a time."""
    for start in range(0, stream.epoch_samples, READ_AT_ONCE):
        yield stream.rows(np.arange(start, min(start + READ_AT_ONCE, stream.epoch_samples)))


def parts(stream: Stream) -> Iterator[np.ndarray]:
    """Every token of a stream's windows, in order, some windows at a time."""
    return (rows.tokens[:, :-1].ravel() for rows in all_rows(stream))


def unigram_bits(counts: np.ndarray, ids: np.ndarray) -> float:
    """Bits of `ids` under the training tokens' `counts` [vocab], one added to each (Laplace)."""
    counts = counts + 1.0
    return float(-np.log2(counts / counts.sum())[ids].sum())


def show(result: dict, folder: Path) -> None:
    perplexity = f"perplexity {math.exp(result['val_loss']):.1f}"
    if "text_bytes" in result:
        print(f"\n{folder}, step {result['step']}, on {result['text_bytes']:,} bytes of held-out text")
        print(f"  this model {result['val_bits_per_byte']:8.3f} bits per byte   "
              f"(loss {result['val_loss']:.3f} nats a token, {perplexity})")  # fmt: skip
        for name, label in (("unigram", "unigram"), ("gzip", "gzip -9"), ("xz", "xz -9")):
            print(f"  {label:10} {result[name + '_bits_per_byte']:8.3f}")
        return
    right = f", {result['val_accuracy']:.1%} right" if "val_accuracy" in result else ""
    kind = "masked tokens" if right else "tokens"
    where = f"{result['targets']:,} {kind} of {result['windows']:,} held-out windows"
    print(f"\n{folder}, step {result['step']}, on {where}")
    print(f"  this model {result['val_loss']:8.3f} nats a token   ({perplexity}{right})")
    print(f"  unigram    {result['unigram_loss']:8.3f}")


if __name__ == "__main__":
    run_tool(main)
