"""The plan of a preparation: the input cut into parts, and what decides the bytes of each. The same for all workers.

The staging folder, beside the output until it gets its name:

    run                       the one process that leads the work; who finds another one there stops
    tokenizer.model           or hf_tokenizer.json
    parts/00012/              a finished part: shards as DatasetWriter names them (with a split: in train/ and val/)
    parts/00012/done.json     its key (a hash of all that decides its content), its shards, and what went in
    parts/00013.3f2a/         a part under way, of run 3f2a
    signed/00012/             with deduplication, the pass before: digests or signatures of documents, and their places
    final/                    the output, assembled from the parts; becomes the output with one rename
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.examples.decompress import is_compressed
from pretrain.prepare.documents import Piece, cut
from pretrain.prepare.filters import FilterSettings
from pretrain.prepare.finding import InputFile, find_files
from pretrain.tokenizer.tokenizer import Tokenizer

FORMAT = 3  # of the parts: raise it when the same input and settings give other bytes or notes
SIGNED, PARTS = "signed", "parts"  # the passes, and their folders
RUN_NAME, DONE_NAME, DUPLICATES_NAME = "run", "done.json", "duplicates.npy"
DEDUP = ("none", "exact", "near")
COMPRESSION = 4  # a guess at what .gz, .zst and Parquet save
BYTES_PER_TOKEN = 4  # a guess; a part holds the text of about one shard


@dataclass(frozen=True)
class Settings:
    """What decides the bytes that are written, beside the input and the tokenizer."""

    text_key: str = "text"
    strict: bool = False
    val_fraction: float = 0.0
    chunk_tokens: int = 262_144
    shard_tokens: int = 1 << 26
    filters: FilterSettings = FilterSettings()
    dedup: str = "none"
    dedup_threshold: float = 0.8
    drop_bad: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """The folders of the output that get shards, "." for itself."""
        return ("train", "val") if self.val_fraction else (".",)


@dataclass(frozen=True)
class Part:
    """Consecutive pieces of the input, the (size, mtime_ns) of their files, and the hash of what decides the part."""

    pieces: tuple[Piece, ...]
    stats: tuple[tuple[int, int], ...]
    key: str

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """The work, the same for all workers. `run` names the one process that leads it, `threads` are for each worker."""

    staging: Path
    run: str
    settings: Settings
    tokenizer_name: str
    tokenizer_sha256: str
    parts: tuple[Part, ...]
    threads: int = 1

    def with_threads(self, threads: int) -> "Plan":
        return replace(self, threads=threads)

    def folder(self, stage: str, number: int) -> Path:
        """Where a finished part lies."""
        return self.staging / stage / f"{number:05d}"

    def key(self, stage: str, number: int) -> str:
        """What `done.json` of the part must say; with deduplication the result depends on other parts too."""
        key = self.parts[number].key
        if stage == SIGNED or self.settings.dedup == "none":
            return key
        return _sha256(key.encode() + (self.folder(SIGNED, number) / DUPLICATES_NAME).read_bytes())

    def done(self, stage: str, number: int) -> dict | None:
        """The `done.json` of a finished part, if there is one of this input and these settings."""
        path = self.folder(stage, number) / DONE_NAME
        if not path.exists():
            return None
        done = json.loads(path.read_bytes())
        return done if done["key"] == self.key(stage, number) else None

    def describe(self, number: int) -> str:
        """A part, for messages."""
        first, last = self.parts[number].pieces[0].path, self.parts[number].pieces[-1].path
        return f"part {number} ({first}{'' if first == last else f' to {last}'})"


def make_plan(staging: Path, run: str, files: Sequence[InputFile], tokenizer: Tokenizer, settings: Settings) -> Plan:
    """Cut the input into parts of about one shard."""
    part_bytes = max(1, settings.shard_tokens * BYTES_PER_TOKEN)
    evaluation = [_sha256(file.path.read_bytes()) for file in _evaluation_files(settings)]
    common = json.dumps([FORMAT, asdict(settings), tokenizer.sha256, evaluation])
    stats = {file.file: (stat.st_size, stat.st_mtime_ns) for file in files if (stat := os.stat(file.file))}
    parts = []
    for pieces in _grouped(cut(files, part_bytes), part_bytes):
        facts = [(os.path.abspath(piece.file), piece.start, piece.end, *stats[piece.file]) for piece in pieces]
        key = _sha256(json.dumps([common, facts]).encode())
        parts.append(Part(tuple(pieces), tuple(stats[piece.file] for piece in pieces), key))
    return Plan(staging, run, settings, tokenizer.file_name, tokenizer.sha256, tuple(parts))


def _evaluation_files(settings: Settings) -> list[InputFile]:
    return find_files(settings.filters.decontaminate).files if settings.filters.decontaminate else []


def _grouped(pieces: list[Piece], part_bytes: int) -> Iterator[list[Piece]]:
    group, size = [], 0
    for piece in pieces:
        is_packed = is_compressed(piece.path) or piece.path.suffix.lower() == ".parquet"
        group.append(piece)
        size += (piece.end - piece.start) * (COMPRESSION if is_packed else 1)
        if size >= part_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
