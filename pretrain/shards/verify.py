"""Checks a local data set byte by byte: all that index, sidecars, tars and tokenizer say of each other must agree.

Nothing stops at the first fault. A shard is read in blocks, so memory stays flat.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.shards import sidecar
from pretrain.shards.manifest import INDEX_NAME, Manifest, Shard
from pretrain.shards.samples import content_problems, read_layout, text_bytes
from pretrain.tokenizer.tokenizer import load_tokenizer

_BLOCK = 1 << 20
Progress = Callable[[int], object]  # called with the bytes of shards read since the last call


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be, the file it is in, and the chunk where that is known."""

    path: Path
    problem: str
    chunk: int | None = None

    def __str__(self) -> str:
        if self.problem.startswith(str(self.path)):
            return self.problem
        return f"{self.path}{'' if self.chunk is None else f', chunk {self.chunk:08d}'}: {self.problem}"


def faults(manifest: Manifest, deep: bool, progress: Progress) -> Iterator[Fault]:
    """Every fault of a local data set whose index was read. `deep`: walk the tars and look at every number too."""
    byte_lengths = None
    try:
        path = manifest.tokenizer_path
        if deep:
            tokenizer = load_tokenizer(path)
            byte_lengths = tokenizer.byte_lengths() if tokenizer.is_exact else None
            if (tokenizer.vocab_size, tokenizer.special_ids) != (manifest.vocab_size, manifest.special_ids):
                yield Fault(path, f"its vocabulary of {tokenizer.vocab_size:,} or its special ids are not those of "
                            f"{INDEX_NAME} ({manifest.vocab_size:,})")  # fmt: skip
                byte_lengths = None
    except ValueError as error:
        yield Fault(manifest.folder / manifest.tokenizer_name, str(error))
    largest, all_full = 0, True
    for number, shard in enumerate(manifest.shards):
        path = manifest.folder / shard.name
        table, found = _table(manifest, number)
        yield from found
        if not path.is_file():
            yield Fault(path, f"it is missing, {INDEX_NAME} lists it")
            continue
        damaged = set()
        for fault in _byte_faults(path, shard, table, progress):
            damaged.add(fault.chunk)
            yield fault
        if deep:
            yield from _deep_faults(manifest, number, table, damaged, byte_lengths)
            largest = max([largest, *table["tokens"].tolist()])
            all_full = all_full and len(table) > 0 and (table["tokens"][:-1] == manifest.chunk_tokens).all()
    if deep and not manifest.full_chunks and (all_full or largest != manifest.chunk_tokens):
        yield Fault(manifest.folder / INDEX_NAME, f"full_chunks is false and chunk_tokens {manifest.chunk_tokens:,}, "
                    f"but the largest chunk holds {largest:,} tokens, all full: {bool(all_full)}")  # fmt: skip


def hash_regions(file: BinaryIO, sizes: Sequence[int], progress: Progress) -> tuple[str, list[int | None], int]:
    """Read a file once: its sha256, the crc32 of regions of `sizes` bytes end to end (None: cut short), its size."""
    sha256, crc32s, total = hashlib.sha256(), [], 0

    def read(size: int) -> bytes:
        nonlocal total
        data = file.read(min(size, _BLOCK))
        sha256.update(data)
        total += len(data)
        progress(len(data))
        return data

    file.seek(0)
    for size in sizes:
        crc32 = 0
        while size and (data := read(size)):
            crc32 = zlib.crc32(data, crc32)
            size -= len(data)
        crc32s.append(None if size else crc32)
    while read(_BLOCK):
        pass
    return sha256.hexdigest(), crc32s, total


def _table(manifest: Manifest, number: int) -> tuple[np.ndarray, list[Fault]]:
    """The chunks of a shard, none where its sidecar cannot be used, and why."""
    shard = manifest.shards[number]
    path = manifest.folder / sidecar.sidecar_name(shard.name)
    try:
        return manifest.chunks(number), []
    except ValueError as error:
        found = [Fault(path, str(error))]
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == shard.index_sha256:  # it is as it was written: list all that is wrong
            with suppress(ValueError):
                problems = manifest.chunk_problems(number, sidecar.from_bytes(data))
                found = [Fault(path, problem) for problem in problems]
    return np.zeros(0, sidecar.CHUNK_DTYPE), found


def _byte_faults(path: Path, shard: Shard, table: np.ndarray, progress: Progress) -> Iterator[Fault]:
    with open(path, "rb") as file:
        sha256, crc32s, size = hash_regions(file, table["bytes"].tolist(), progress)
    if size != shard.bytes:
        yield Fault(path, f"it has {size:,} bytes, expected {shard.bytes:,}")
    for chunk, (found, expected) in enumerate(zip(crc32s, table["crc32"].tolist(), strict=True)):
        if found is None:
            yield Fault(path, "the file ends before the end of this chunk", chunk)
        elif found != expected:
            yield Fault(path, f"crc32 is {found:08x}, expected {expected:08x}", chunk)
    if sha256 != shard.sha256:
        yield Fault(path, f"sha256 is {sha256}, expected {shard.sha256}")


def _deep_faults(
    manifest: Manifest, number: int, table: np.ndarray, damaged: set[int | None], byte_lengths: np.ndarray | None
) -> Iterator[Fault]:
    """What only the members and the numbers of a tar show; chunks known to be damaged are not looked at again."""
    shard, path = manifest.shards[number], manifest.folder / manifest.shards[number].name
    text, is_whole = 0, byte_lengths is not None and not damaged and len(table) > 0
    with open(path, "rb") as file:
        for i, chunk in enumerate(table):
            if i not in damaged:
                problems = content_problems(file, chunk, manifest.dtype, manifest.vocab_size)
                yield from (Fault(path, problem, i) for problem in problems)
                is_whole = is_whole and not problems
                text += text_bytes(file, chunk, manifest.dtype, byte_lengths) if is_whole else 0
        try:
            layout = read_layout(file, str(path))
        except ValueError as error:
            yield Fault(path, str(error))
            return
    # the tokenizer reads a U+2581 (3 bytes) as a space (1), so text that has some is longer than its tokens say
    more = shard.text_bytes - text
    if is_whole and not (0 <= more <= 2 * text and more % 2 == 0):
        yield Fault(path, f"its tokens stand for {text:,} bytes of text, expected {shard.text_bytes:,}")
    if layout.dtype.replace("i", "u") != manifest.dtype:
        yield Fault(path, f"it holds {layout.dtype}, expected {manifest.dtype}")
    if len(table):
        yield from _layout_faults(path, layout.chunks, table)


def _layout_faults(path: Path, found: np.ndarray, table: np.ndarray) -> Iterator[Fault]:
    if len(found) != len(table):
        yield Fault(path, f"it holds {len(found):,} samples with tokens, expected {len(table):,} as in its sidecar")
    count = min(len(found), len(table))
    for name in sidecar.CHUNK_DTYPE.names:
        if name != "crc32":  # a walk does not compute it
            for i in np.flatnonzero(found[name][:count] != table[name][:count]).tolist():
                yield Fault(path, f"{name} is {found[name][i]:,}, expected {table[name][i]:,} as in its sidecar", i)
