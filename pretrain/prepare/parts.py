"""The work on one part of a preparation (see plan.py): read, filter, tokenize and write it, complete or not at all.

With deduplication there is a pass before, sign_part: a digest or a signature of each document that the filters keep.
Then duplicates.py decides which documents write_part leaves out.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from pretrain.files import sync_folder, write_synced
from pretrain.prepare import duplicates
from pretrain.prepare.dedup import MinHasher, digest
from pretrain.prepare.documents import Counts, Document, Piece, is_held_out, read_documents, sha256_of
from pretrain.prepare.encode import encode
from pretrain.prepare.filters import Filters, FilterSettings, Report
from pretrain.prepare.plan import DONE_NAME, PARTS, RUN_NAME, SIGNED, Plan
from pretrain.shards.writer import DatasetWriter, token_dtype
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

PROGRESS_NAME = "progress"
PROGRESS_SECONDS = 1.0
LARGEST_SHARD = 1.5  # a shard may have this many times the tokens asked for: better than a tiny one after it


@dataclass
class Tally:
    """What became of a part: what was read, what was left out, and a line of inputs.json for each piece."""

    counts: Counts = field(default_factory=Counts)
    report: Report = field(default_factory=Report)
    pieces: list[dict] = field(default_factory=list)

    def start(self, piece: Piece) -> dict:
        """The line of a piece; `documents`, `bytes` of text and `tokens` are what is written of it."""
        facts = {"file": piece.file, "start": piece.start, "end": piece.end, "sha256": "",
                 "documents": 0, "bytes": 0, "tokens": 0}  # fmt: skip
        self.pieces.append(facts)
        return facts

    def end(self, piece: Piece, counts: Counts, report: Report) -> None:
        """The piece that was started last has been read."""
        dropped = {reason: tally.documents for reason, tally in report.dropped.items() if tally.documents}
        self.pieces[-1] |= {
            "sha256": sha256_of(piece), "invalid": counts.invalid, "ignored_members": counts.ignored_members,
            "dropped": {name: n for name, n in (("empty", counts.empty), ("bad", counts.bad)) if n} | dropped,
        }  # fmt: skip
        self.counts.merge(counts)
        self.report.merge(report)


class Progress:
    """How much of a part is done, in a small file that the leading process reads."""

    def __init__(self, folder: Path):
        self._path = folder / PROGRESS_NAME
        self._done = [0, 0]
        self._written = time.monotonic()

    def add(self, input_bytes: int, tokens: int) -> None:
        self._done[0] += input_bytes
        self._done[1] += tokens
        if time.monotonic() - self._written >= PROGRESS_SECONDS:
            self.save()

    def save(self) -> None:
        self._path.write_text("{} {}".format(*self._done), encoding="utf-8")
        self._written = time.monotonic()


@dataclass(frozen=True)
class _Found:
    """A document that the filters keep, and what is noted of the piece that it is of."""

    document: Document
    piece: dict
    report: Report


@dataclass(frozen=True)
class _Tag:
    """What goes with a text through the tokenizer."""

    piece: dict
    bytes: int
    input_bytes: int
    is_val: bool


def write_part(plan: Plan, number: int) -> None:
    """Tokenize and write one part, unless it is there."""
    if plan.done(PARTS, number):
        return
    settings, tokenizer = plan.settings, _tokenizer(plan.staging / plan.tokenizer_name, plan.tokenizer_sha256)
    dtype = token_dtype(tokenizer.vocab_size)
    shard_tokens = int(settings.shard_tokens * LARGEST_SHARD)
    with _part_folder(plan, PARTS, number) as work:
        progress, tally = Progress(work), Tally()
        for split in settings.splits:
            (work / split).mkdir(exist_ok=True)
        writers = [DatasetWriter(work / split, dtype, settings.chunk_tokens, shard_tokens) for split in settings.splits]
        try:
            for tokens, tag in encode(_texts_to_write(plan, number, tally), tokenizer, plan.threads):
                writers[tag.is_val].add(tokens, tag.bytes)
                tag.piece["documents"] += 1
                tag.piece["bytes"] += tag.bytes
                tag.piece["tokens"] += len(tokens)
                progress.add(tag.input_bytes, len(tokens))
            shards = [[asdict(shard) for shard in writer.close()] for writer in writers]
        finally:
            for writer in writers:
                writer.abandon()
        progress.save()
        done = {"key": plan.key(PARTS, number), "shards": dict(zip(settings.splits, shards, strict=True)),
                "counts": asdict(tally.counts), "report": tally.report.to_json(), "pieces": tally.pieces}  # fmt: skip
        write_synced(work / DONE_NAME, json.dumps(done).encode())


def _texts_to_write(plan: Plan, number: int, tally: Tally) -> Iterator[tuple[str, _Tag]]:
    settings = plan.settings
    originals = enumerate(duplicates.load(plan, number).tolist()) if settings.dedup != "none" else None
    skipped = 0  # bytes of input whose documents were dropped
    for found in _documents(plan, number, tally):
        document = found.document
        skipped += document.input_bytes
        index, original = next(originals) if originals else (-1, -1)
        if original >= 0:  # where the two lie is said at the end, by duplicates.name_places
            reason, numbers = f"{settings.dedup}_duplicate", (number, index, original)
            found.report.drop(reason, document.source, document.text, numbers=numbers)
            continue
        data = document.text.encode()
        yield document.text, _Tag(found.piece, len(data), skipped, is_held_out(data, settings.val_fraction))
        skipped = 0
    assert originals is None or next(originals, None) is None


def sign_part(plan: Plan, number: int) -> None:
    """Save a digest or a signature of each document that the filters keep, unless it is there."""
    if plan.done(SIGNED, number):
        return
    hasher = MinHasher() if plan.settings.dedup == "near" else None
    with _part_folder(plan, SIGNED, number) as work:
        progress, tally = Progress(work), Tally()
        rows, places = [], []
        for found in _documents(plan, number, tally):
            text = found.document.text
            rows.append(hasher.signature(text) if hasher else np.frombuffer(digest(text), np.uint8))
            places.append((len(tally.pieces) - 1, found.document.number))
            progress.add(found.document.input_bytes, 0)
        duplicates.save_signatures(work, rows, places)
        write_synced(work / DONE_NAME, json.dumps({"key": plan.key(SIGNED, number)}).encode())


def _documents(plan: Plan, number: int, tally: Tally) -> Iterator[_Found]:
    """The documents of a part that the filters keep, with what the filters make of their texts."""
    part, settings = plan.parts[number], plan.settings
    filters = load_filters(settings.filters)
    for piece, stat in zip(part.pieces, part.stats, strict=True):
        facts, counts, report = tally.start(piece), Counts(), Report()
        skipped = 0
        for document in read_documents([piece], settings.text_key, counts, settings.strict, settings.drop_bad):
            skipped += document.input_bytes
            text = filters.apply(document.text, document.source, report)
            if text is not None:
                yield _Found(Document(text, skipped, document.source, document.number), facts, report)
                skipped = 0
        tally.end(piece, counts, report)
        now = piece.path.stat()
        if (now.st_size, now.st_mtime_ns) != stat:
            raise ValueError(f"{piece.path} was changed while it was read: run the same command again")


@contextlib.contextmanager
def _part_folder(plan: Plan, stage: str, number: int) -> Iterator[Path]:
    """A folder for the work on a part, which gets its name when all in it is complete and durable.

    The folder's name has the run in it: what an earlier run left, or still does, never mixes with the work of this one.
    """
    work = plan.staging / stage / f"{number:05d}.{plan.run}"
    if (plan.staging / RUN_NAME).read_text(encoding="utf-8") != plan.run:
        raise ValueError(f"another run of write_shards.py has taken over {plan.staging}")
    if work.exists():  # a cluster starts a task again
        shutil.rmtree(work)
    work.mkdir()
    try:
        yield work
        for folder in [path for path in work.iterdir() if path.is_dir()] + [work]:
            sync_folder(folder)
        os.rename(work, plan.folder(stage, number))
        sync_folder(work.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@lru_cache(maxsize=1)
def load_filters(settings: FilterSettings) -> Filters:
    """The filters; their evaluation texts are read once."""
    return Filters(settings)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer.sha256 == sha256
    return tokenizer
