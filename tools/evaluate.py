"""python tools/evaluate.py runs/NAME [--data SHARDS]
python tools/evaluate.py runs/NAME --suite --memorization
python tools/evaluate.py runs/NAME --tasks lambada_openai,hellaswag --limit 200

Bits per byte of a run's checkpoint on its whole validation shards (of several sets, the first one's), beside a unigram
model (token frequencies of the training shards, of at most 50 million tokens), gzip -9 and xz -9 on the same text. Of a
masked model: loss and accuracy on the masked tokens of these shards, masked as in training, beside the unigram model's
loss on the same tokens.

With --suite, instead: tasks made of the validation shards, for causal models in any language: which of four passages
goes on a text, its last word, and a passage that is read twice. With --memorization: how much of the training shards
the model continues word by word, by how often they have it, beside held-out text. With --tasks: tasks of the LM
Evaluation Harness on the run's export (or on a Hugging Face folder); their data are fetched, or are local ones that
YAML files in --include-path describe (these can name Python code: use your own).

Results are also kept in runs/NAME/evaluation.json.
"""

import argparse
import gzip
import json
import lzma
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain import dist, hardware
from pretrain.checkpoint.load import checkpoint_of, load_model, read_header, run_of
from pretrain.cli import run_tool, stops_as_ctrl_c
from pretrain.config import compose
from pretrain.config.held_out import HeldOut, held_out_sets, split_name, text_of
from pretrain.config.schema import Config
from pretrain.evaluation import harness, memorization
from pretrain.evaluation.suite import run_suite
from pretrain.evaluation.validation import Validation
from pretrain.files import EVALUATION, RESULT, alone, read_object, write_atomically
from pretrain.hub import convert
from pretrain.shards import manifest as manifests
from pretrain.shards.manifest import Manifest
from pretrain.stream import opening
from pretrain.stream.objectives import IGNORE, MaskedLM, make_objective
from pretrain.stream.stream import Rows, Stream
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

READ_AT_ONCE = 256  # windows
COUNTED = 50_000_000  # tokens of the training text, for the unigram model
LIMIT = 500  # examples of a task of --suite, windows of a kind for --memorization
SUITES = ("suite", "memorization", "tasks")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = run_of(args.run)
    if args.tasks:
        harness.check()
    if args.suite or args.memorization or not args.tasks:
        report(own_figures(args, folder), folder)
    if args.tasks:
        with stops_as_ctrl_c():
            report({"tasks": harness_tasks(args)}, folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--data", help="shards, or the name of one of the run's held-out sets (default: "
                        "the first of these, if it has some)")  # fmt: skip
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="default: %(default)s")
    parser.add_argument("--suite", action="store_true", help="tasks made of the validation shards")
    parser.add_argument("--memorization", action="store_true", help="training text that the model knows by heart")
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of the LM Evaluation Harness")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="--tasks: a folder of tasks of your own")
    parser.add_argument("--limit", type=int, help=f"examples of each task (default: {LIMIT}; of --tasks: all)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if args.include_path and not args.tasks:
        parser.error("--include-path is for --tasks")
    return args


def own_figures(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Those of all held-out text; or, by their names, the suites that were asked for."""
    if (args.run / "config.json").is_file():
        raise ValueError(f"{args.run} is a Hugging Face folder: give it --tasks, or import it (tools/import_hf.py)")
    (cfg, chosen), tokenizer = read_run(args, folder), load_tokenizer(folder)
    step = {"step": read_header(checkpoint_of(args.run)).step} | ({"set": chosen.name} if chosen.name else {})
    device = dist.device_of()
    model = load_model(args.run).to(device, hardware.dtype_for(args.precision, device))
    limit = args.limit or LIMIT
    found: dict[str, Any] = {}
    if args.suite:
        held_out = open_split(cfg.data.val, "val", cfg, tokenizer)
        found["suite"] = step | run_suite(model, held_out, tokenizer, cfg.train.seq_len, limit)
    if args.memorization:
        found["memorization"] = step | known_by_heart(model, cfg, tokenizer, limit)
    return found or step | on_held_out_text(model, device, cfg, tokenizer)


def read_run(args: argparse.Namespace, folder: Path) -> tuple[Config, HeldOut]:
    """The run's config with one held-out set, and that; a fine-tuned run has no shards of its own."""
    cfg = compose.read(folder / "config.yaml")
    if cfg.task is not None:
        other = (f"{folder} was fine-tuned for {cfg.task.name}: its figures are in {RESULT}, and tools/predict.py "
                 f"{folder} --input FILE --score has them of other data")  # fmt: skip
        if not args.data:
            raise ValueError(f"{other}; for those of a language model on shards, name these with --data")
        if (head := read_header(checkpoint_of(args.run)).model["head"]) != "lm":
            raise ValueError(f"{other}; it is no language model (model.head={head})")
        cfg = replace(cfg, data=replace(cfg.data, train=args.data, val=None))
    chosen = choose(args.data, held_out_sets(cfg.data.val), folder)
    return replace(cfg, data=replace(cfg.data, val=chosen.place)), chosen


def choose(data: str | None, sets: list[HeldOut], folder: Path) -> HeldOut:
    """What --data names, a place or one of the run's sets; without it the first of these, and it is said which."""
    if not data and not sets:
        raise ValueError(f"{folder} was trained without data.val: name validation shards with --data")
    if not data:
        if len(sets) > 1:
            print(f"{folder} has the held-out sets {', '.join(map(str, sets))}: evaluating {sets[0].name}, "
                  "--data NAME takes another", file=sys.stderr)  # fmt: skip
        return sets[0]
    by_name = {} if os.path.exists(data) else {each.name: each for each in sets if each.name}
    return by_name.get(data) or HeldOut(*split_name(data))


def open_split(location: str, split: str, cfg: Config, tokenizer: Tokenizer) -> Manifest:
    manifest = manifests.open_split(location, split, opening.cache_settings(cfg.data))
    manifest.check_tokenizer(tokenizer.path, tokenizer.sha256)
    return manifest


def on_held_out_text(
    model: torch.nn.Module, device: torch.device, cfg: Config, tokenizer: Tokenizer
) -> dict[str, float]:
    """Figures of all windows of the validation shards, and of the baselines."""
    objective = make_objective(cfg.objective, tokenizer, cfg.seed)
    where = (cfg.data, cfg.train.seq_len, tokenizer)
    held_out = opening.open_held_out(cfg.data.val, *where)
    training = [opening.open_held_out(source, *where, "train") for source in cfg.data.sources]
    result = {"windows": held_out.epoch_samples} | evaluate_model(model, device, held_out, tokenizer, objective)
    if cfg.task is None and held_out.fingerprints[0] in [stream.fingerprints[0] for stream in training]:
        result["is_trained_on"] = True
    counts = token_counts(training, cfg.train.seq_len, tokenizer.vocab_size)
    if "val_bits_per_byte" in result:
        return result | text_baselines(held_out, tokenizer, counts)
    return result | token_baseline(held_out, tokenizer, objective, counts)


def evaluate_model(
    model: torch.nn.Module, device: torch.device, held_out: Stream, tokenizer: Tokenizer, objective: Callable
) -> dict[str, float]:
    """What `Validation` says over all windows, with a progress bar."""
    validation = Validation(held_out, objective, 0, 16, tokenizer.byte_lengths())
    with tqdm(total=held_out.epoch_samples, desc="evaluating", unit=" windows") as bar, torch.no_grad():

        def evaluate(score_rows: Callable, **batch: torch.Tensor) -> torch.Tensor:
            bar.update(len(batch["inputs"]))
            return score_rows(model, **batch).double().cpu()

        return validation.run(evaluate, dist.ALONE, device)


def token_counts(streams: list[Stream], seq_len: int, vocab_size: int) -> np.ndarray:
    """How often windows of training text, evenly spread and at most COUNTED tokens of them, have each token [vocab]."""
    tokens = sum(stream.epoch_samples for stream in streams) * seq_len
    every, counts = -(-tokens // COUNTED), np.zeros(vocab_size, dtype=np.int64)
    with tqdm(total=tokens // every, desc="counting", unit=" tokens", unit_scale=True, delay=2) as bar:
        for stream in streams:
            for rows in all_rows(stream, every):
                counts += np.bincount(rows.tokens[:, :-1].ravel(), minlength=vocab_size)
                bar.update(rows.tokens[:, :-1].size)
    return counts


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


def all_rows(stream: Stream, every: int = 1) -> Iterator[Rows]:
    """All windows of a stream, or one out of every so many, in order, some at a time."""
    numbers = np.arange(0, stream.epoch_samples, every)
    for start in range(0, len(numbers), READ_AT_ONCE):
        yield stream.rows(numbers[start : start + READ_AT_ONCE])


def parts(stream: Stream) -> Iterator[np.ndarray]:
    """Every token of a stream's windows, in order, some windows at a time."""
    return (rows.tokens[:, :-1].ravel() for rows in all_rows(stream))


def unigram_bits(counts: np.ndarray, ids: np.ndarray) -> float:
    """Bits of `ids` under the training tokens' `counts` [vocab], one added to each (Laplace)."""
    counts = counts + 1.0
    return float(-np.log2(counts / counts.sum())[ids].sum())


def report(found: dict[str, Any], folder: Path) -> None:
    show(found, folder)
    save(folder / EVALUATION, found)


def show(found: dict[str, Any], folder: Path) -> None:
    if "val_loss" in found:
        show_held_out(found, folder)
    for name in SUITES:
        if name in found:
            show_table(f"{folder}, {name}{of_set(found[name])}", found[name])


def of_set(found: dict[str, Any]) -> str:
    return f" ({found['set']})" if "set" in found else ""


def show_held_out(result: dict[str, Any], folder: Path) -> None:
    perplexity = f"perplexity {math.exp(result['val_loss']):.1f}"
    if "text_bytes" in result:
        print(f"\n{folder}, step {result['step']}, on {result['text_bytes']:,} bytes of {text_of(result)}")
        print(f"  this model {result['val_bits_per_byte']:8.3f} bits per byte   "
              f"(loss {result['val_loss']:.3f} nats a token, {perplexity})")  # fmt: skip
        for name, label in (("unigram", "unigram"), ("gzip", "gzip -9"), ("xz", "xz -9")):
            print(f"  {label:10} {result[name + '_bits_per_byte']:8.3f}")
        return
    right = f", {result['val_accuracy']:.1%} right" if "val_accuracy" in result else ""
    kind = "masked tokens" if right else "tokens"
    where = f"{result['targets']:,} {kind} of {result['windows']:,} windows of {text_of(result)}"
    print(f"\n{folder}, step {result['step']}, on {where}")
    print(f"  this model {result['val_loss']:8.3f} nats a token   ({perplexity}{right})")
    print(f"  unigram    {result['unigram_loss']:8.3f}")


def known_by_heart(model: torch.nn.Module, cfg: Config, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """Of windows of training text by how often it has them, and of held-out ones: how many are continued exactly."""
    length = memorization.PROMPT + memorization.CONTINUATION
    if model.trunk.config.max_positions < length:
        raise ValueError(f"--memorization takes windows of {length} tokens: this model is too short for them")
    training = [open_split(source, "train", cfg, tokenizer) for source in cfg.data.sources]
    held_out = open_split(cfg.data.val, "val", cfg, tokenizer)
    if held_out.fingerprint in [manifest.fingerprint for manifest in training]:
        raise ValueError(f"--memorization sets training text beside held-out text, and {cfg.data.val} is both: name a "
                         "folder of shards that has train/ and val/")  # fmt: skip
    special = [*tokenizer.special_ids.values()]
    total = memorization.tokens_to_read(training, held_out)
    with tqdm(total=total, desc="counting", unit=" tokens", unit_scale=True) as bar:
        chosen = memorization.choose_windows(training, held_out, special, limit, bar.update)
    found: dict[str, Any] = {"prompt_tokens": memorization.PROMPT, "continued_tokens": memorization.CONTINUATION}
    with tqdm(total=sum(map(len, chosen.values())), desc="continuing", unit=" windows") as bar:
        for name, rows in chosen.items():
            exact = memorization.memorized(model, rows, on_rows=bar.update)
            found[name] = {"windows": len(rows), "exact": float(exact.mean()) if len(rows) else None}
    return found


def harness_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The harness's figures of each task on a Hugging Face folder, or on a run's export."""
    precision = hardware.resolve_precision(args.precision, dist.device_of())
    names = [name for name in args.tasks.split(",") if name]
    options = (str(hardware.DTYPES[precision]).removeprefix("torch."), names, args.include_path, args.limit)
    if (args.run / "config.json").is_file():
        return harness.evaluate(args.run, *options)
    step = read_header(checkpoint_of(args.run)).step
    with tempfile.TemporaryDirectory() as scratch:
        convert.export_hf(args.run, Path(scratch) / "model", precision)
        found = harness.evaluate(Path(scratch) / "model", *options)
    return {task: figures | {"step": step} for task, figures in found.items()}


def save(path: Path, found: dict[str, Any]) -> None:
    """Put what was found beside what is there: other suites, and other tasks of the harness."""
    with alone(path):
        before = read_object(path)
        if "tasks" in found:
            found["tasks"] = before.get("tasks", {}) | found["tasks"]
        kept = {name: value for name, value in before.items() if name in SUITES or "val_loss" not in found}
        write_atomically(path, (json.dumps(kept | found, indent=1) + "\n").encode())


def show_table(title: str, found: dict[str, Any]) -> None:
    """A line for each record of a suite."""
    print(f"\n{title}")
    width = max(len(name) for name, record in found.items() if isinstance(record, dict))
    for name, record in found.items():
        if isinstance(record, dict):
            values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in record.items())  # fmt: skip
            print(f"  {name:{width}}  {', '.join(values)}")


if __name__ == "__main__":
    run_tool(main, tells=True)
