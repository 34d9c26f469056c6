"""python tools/write_shards.py --input PATH... --tokenizer tokenizer.model --output DIR [--val-fraction 0.01]

Tokenizes text, JSONL (also .gz, .zst), Parquet, WebDataset tars, or folders of them into WebDataset tar shards (format
1: see pretrain/shards/manifest.py). With --val-fraction, DIR/train and DIR/val: a document belongs to one of them by
the hash of its text, so copies of a text never lie on both sides. DIR/inputs.json tells what went in and what became
of it.

The same input and options give the same bytes, with any number of --workers, on this machine or on a cluster. The work
is done in parts, in a hidden folder beside DIR: whatever ends a run, the same command goes on from the finished parts.
DIR appears when all is complete.
"""

import argparse
import os
import secrets
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain.cli import run_tool, stops_as_ctrl_c
from pretrain.files import NO_ROOM
from pretrain.prepare import duplicates, staging
from pretrain.prepare.documents import Counts
from pretrain.prepare.filters import FilterSettings, Report
from pretrain.prepare.finding import find_files
from pretrain.prepare.parts import PROGRESS_NAME, load_filters, sign_part, write_part
from pretrain.prepare.plan import DEDUP, PARTS, SIGNED, Plan, Settings, make_plan
from pretrain.prepare.workers import CLUSTERS, Executor
from pretrain.shards.manifest import Manifest
from pretrain.shards.writer import token_dtype
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

CLUSTER_THREADS = 2


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.monotonic()
    output = Path(args.output).resolve()
    tokenizer = load_tokenizer(args.tokenizer)
    found = find_files(args.input, args.include, args.exclude)
    for note in found.notes():
        print(f"note: {note}")
    settings = make_settings(args, tokenizer)
    for line in load_filters(settings.filters).notes():
        print(line)
    run = secrets.token_hex(4)
    with stops_as_ctrl_c(), staging.staging_folder(output, run) as folder:
        plan = make_plan(folder, run, found.files, tokenizer, settings)
        try:
            staging.add_tokenizer(folder, tokenizer)
            if settings.dedup != "none":
                work(plan, SIGNED, sign_part, "looking for duplicates", args)
                duplicates.decide(plan)
            work(plan, PARTS, write_part, "tokenizing", args)
            result = staging.assemble(plan, tokenizer, output, found)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise staging.no_room(plan, error, output) from None
            raise
        finally:
            tell_what_stays(folder)
    print_summary(args.output, *result, time.monotonic() - start)


def tell_what_stays(folder: Path) -> None:
    """After an interruption or an error."""
    if sys.exc_info()[0] and (done := staging.finished(folder)):
        print(f"{done} finished parts stay in {folder}: the same command goes on from them", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize text into WebDataset shards: the same bytes with any number of workers, restartable.",
        epilog="example: python tools/write_shards.py --input my_texts/ --tokenizer tokenizer.model --output shards "
        "--val-fraction 0.01 --workers 8 --dedup near --scrub-pii",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="text, JSONL, Parquet, tar files, or folders of them")
    add("--tokenizer", required=True, metavar="PATH", help="from tools/train_tokenizer.py, or the folder of "
        "a Hugging Face tokenizer")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="the folder to make; must not exist")
    add("--val-fraction", type=float, default=0.0, metavar="F", help="share of documents for DIR/val")
    add = parser.add_argument_group("what is read").add_argument
    add("--text-key", default="text", metavar="KEY", help="field of a JSON object or Parquet column (default: text)")
    add("--include", nargs="+", default=[], metavar="GLOB", help="files of folders to take")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="files and subfolders to leave out")
    add("--drop-bad", action="store_true", help="leave out rows that are no JSON or have no text (default: stop there)")
    add("--strict", action="store_true", help="refuse invalid UTF-8 (default: replace it by U+FFFD, and count)")
    add_filters(parser)
    add = parser.add_argument_group("how it is stored").add_argument
    add("--shard-mb", type=float, default=128, metavar="MB", help="size of a shard in MiB (128; at most 1.5x)")
    add("--chunk-tokens", type=int, default=262_144, metavar="N", help="tokens in a chunk (262144)")
    add_workers(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    for name in ("shard_mb", "chunk_tokens", "threads", "workers", "time_minutes", "ngram"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not 0 < args.dedup_threshold <= 1:
        parser.error("--dedup-threshold must be above 0 and at most 1")
    if not args.cluster and (args.partition or args.cluster_option):
        parser.error("--partition and --cluster-option are for --cluster slurm")
    return args


def add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what is left out", "counted, with examples, in DIR/report.json: it quotes the input, so keep it private"
    )
    add = group.add_argument
    add("--min-chars", type=int, default=0, metavar="N", help="leave out shorter documents")
    add("--max-chars", type=int, default=0, metavar="N", help="leave out longer documents")
    add("--scrub-pii", action="store_true", help="replace e-mail addresses, telephone, card numbers and IP addresses")
    add("--phone-region", metavar="CC", help="country of telephone numbers without +..., such as US (default: none)")
    add("--decontaminate", nargs="+", default=[], metavar="PATH", help="leave out documents that share an n-gram of "
        "words with these evaluation texts")  # fmt: skip
    add("--ngram", type=int, default=13, metavar="N", help="words of these n-grams (13)")
    add("--dedup", choices=DEDUP, default="none", help="leave out copies: exact ones, or also near ones (MinHash)")
    add("--dedup-threshold", type=float, default=0.8, metavar="J", help="share of 5-word runs in common (0.8)")


def add_workers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("who does it (never changes a byte)").add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes, or jobs of the cluster (1)")
    add("--threads", type=int, metavar="N", help="of each worker (default: the cores divided by the workers; "
        f"on Slurm {CLUSTER_THREADS})")  # fmt: skip
    add("--cluster", choices=CLUSTERS, help="slurm: an array of jobs by submitit, DIR on a disk that all nodes share; "
        "local: the same on this machine, to try it")  # fmt: skip
    add("--partition", metavar="NAME", help="of Slurm")
    add("--time-minutes", type=int, default=24 * 60, metavar="N", help="limit of a job (1440); it goes on in another")
    add("--cluster-option", action="append", default=[], metavar="KEY=VALUE", type=option, help="of submitit for "
        "Slurm, such as account=NAME, qos=NAME, mem=8GB; may be repeated")  # fmt: skip


def option(text: str) -> tuple[str, str | int | float]:
    """KEY=VALUE, a number where it is one."""
    key, equals, value = text.partition("=")
    if not key.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            pass
    return key, value


def make_settings(args: argparse.Namespace, tokenizer: Tokenizer) -> Settings:
    return Settings(
        text_key=args.text_key,
        strict=args.strict,
        val_fraction=args.val_fraction,
        chunk_tokens=args.chunk_tokens,
        shard_tokens=max(1, int(args.shard_mb * 2**20) // np.dtype(token_dtype(tokenizer.vocab_size)).itemsize),
        filters=FilterSettings(
            min_chars=args.min_chars,
            max_chars=args.max_chars,
            scrub_pii=args.scrub_pii,
            phone_region=args.phone_region,
            decontaminate=tuple(args.decontaminate),
            ngram=args.ngram,
            text_key=args.text_key,
        ),
        dedup=args.dedup,
        dedup_threshold=args.dedup_threshold,
        drop_bad=args.drop_bad,
    )


def work(plan: Plan, stage: str, function, name: str, args: argparse.Namespace) -> None:
    """Do a pass over the parts that are not finished."""
    todo, others = staging.parts_to_do(plan, stage)
    if others:
        print(f"{others} parts were finished for other input or with other options: they are made anew", flush=True)
    if finished := len(plan.parts) - len(todo):
        print(f"going on: {finished} of {len(plan.parts)} parts were finished before ({name})", flush=True)
    workers = max(1, min(args.workers, len(todo)))
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or (CLUSTER_THREADS if args.cluster == "slurm" else max(1, cores // workers))
    options = dict(args.cluster_option)
    executor = Executor(workers, args.cluster, threads, args.partition, args.time_minutes, options)
    with Bar(plan, stage, todo, name):
        function = partial(function, plan.with_threads(threads))
        executor.run(function, todo, plan.describe, plan.staging / f"logs-{stage}")


class Bar:
    """A bar of the bytes of input that are done, read from the folders of the parts: the same for all executors."""

    def __init__(self, plan: Plan, stage: str, todo: list[int], name: str):
        self._run, self._folder = plan.run, plan.staging / stage
        self._todo = {plan.folder(stage, number).name: plan.parts[number].bytes for number in todo}
        total = sum(part.bytes for part in plan.parts)
        left = sum(self._todo.values())
        self._before, self._start = total - left, time.monotonic()
        self._finished: dict[str, int] = {}  # part -> tokens
        shown = {"desc": name, "unit": "B", "unit_scale": True, "mininterval": 0.5}
        self._bar = tqdm(total=total, initial=total - left, **shown)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def _poll(self) -> None:
        while not self._stop.wait(1.0):
            try:
                names = set(os.listdir(self._folder))
            except OSError:  # a network disk has a bad moment
                continue
            done = self._before
            tokens = 0
            for name, size in self._todo.items():
                if name in names and name not in self._finished:
                    self._finished[name] = self._read(name)[1]
                if name in self._finished:
                    done += size
                    tokens += self._finished[name]
                elif (under_way := f"{name}.{self._run}") in names:
                    part_bytes, part_tokens = self._read(under_way)
                    done, tokens = done + part_bytes, tokens + part_tokens
            if tokens:
                rate = tokens / (time.monotonic() - self._start) / 1e6
                self._bar.set_postfix_str(f"{rate:.2f}M tokens/s", refresh=False)
            self._bar.update(max(0, done - self._bar.n))

    def _read(self, name: str) -> tuple[int, int]:
        try:
            done, tokens = (self._folder / name / PROGRESS_NAME).read_text(encoding="utf-8").split()
            return int(done), int(tokens)
        except (OSError, ValueError):  # not yet there, or being written
            return 0, 0


def print_summary(output: str, manifests: list[Manifest], counts: Counts, report: Report, seconds: float) -> None:
    """Print what was written."""
    if notes := counts.summary():
        print(f"note: {notes}")
    for line in report.summary():
        print(line)
    for manifest in manifests:
        name = Path(output) / Path(manifest.location).name if len(manifests) > 1 else Path(output)
        print(
            f"wrote {name}: {manifest.docs:,} documents, {manifest.text_bytes / 1e6:,.1f} MB of text, "
            f"{manifest.tokens:,} tokens ({manifest.text_bytes / manifest.tokens:.2f} bytes a token, special ones "
            f"included), {len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
        )
    size = sum(manifest.text_bytes for manifest in manifests)
    tokens = sum(manifest.tokens for manifest in manifests)
    print(f"{seconds:.1f} s: {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s")


if __name__ == "__main__":
    run_tool(main, tells=True)
