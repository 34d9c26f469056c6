"""What a tar of token arrays holds, found by walking it: the samples of stock webdataset as chunks of a sidecar.

A sample is adjacent members that share a key (the name up to its first dot): KEY.tokens.npy, and KEY.docs.npy if it
says where documents start. Other members are passed over and counted, but for pickles, which stock webdataset would
run: they are refused. Only headers are believed, and those are checked (see tar.py and npy.py).
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pretrain.shards import npy, tar
from pretrain.shards.sidecar import CHUNK_DTYPE, CONTINUES, WHOLE

DTYPES = {"tokens.npy": ("<u2", "<u4", "<i4"), "docs.npy": ("<i4",)}
_REMEDY = {
    "tokens.npy": "write uint16 (or uint32, for a vocabulary above 65,536): array.astype(np.uint16)",
    "docs.npy": "write int32: array.astype(np.int32)",
}
_PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".joblib")
_SAMPLE_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as stock webdataset cuts names
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Array:
    """A .npy member of a tar: `count` numbers from byte `offset` of the tar on."""

    dtype: str
    offset: int
    count: int


@dataclass
class Layout:
    """Where the chunks of a tar lie: CHUNK_DTYPE[n], the crc32s still 0. `dtype` as stored: '<u2', '<u4' or '<i4'.

    `ignored` counts the members passed over, by what follows the first dot of their names.
    """

    chunks: np.ndarray
    dtype: str
    ignored: Counter[str] = field(default_factory=Counter)


def read_layout(file: BinaryIO, where: str) -> Layout:
    """Walk a tar of at least one sample with tokens; `ValueError` with the member for anything unsafe or unfit."""
    layout = Layout(np.zeros(0, CHUNK_DTYPE), "")
    rows: list[tuple[int, ...]] = []
    position = 0
    for key, arrays, end in _samples(file, where, layout.ignored):
        tokens, docs = arrays.get("tokens.npy"), arrays.get("docs.npy")
        if tokens is None:
            raise ValueError(f"{where}: sample {key!r} has docs.npy without tokens.npy: write both or none")
        if not tokens.count:
            layout.ignored["tokens.npy without a token"] += 1
            continue
        layout.dtype = layout.dtype or tokens.dtype
        if tokens.dtype != layout.dtype:
            raise ValueError(f"{where}: sample {key!r} holds {tokens.dtype}, those before it {layout.dtype}: write one")
        flags = WHOLE
        if docs is not None:
            flags = 0 if docs.count and _first(file, docs) == 0 else CONTINUES
        docs = docs or Array("<i4", tokens.offset, 0)
        rows.append((position, end - position, 0, flags, tokens.offset, tokens.count, docs.offset, docs.count))
        position = end
    if not rows:
        found = ", ".join(f"{count} x .{kind}" for kind, count in layout.ignored.most_common(5)) or "nothing"
        raise ValueError(f"{where} holds no tokens (there is: {found}): move it out of the folder")
    layout.chunks = np.array(rows, dtype=CHUNK_DTYPE)
    layout.chunks[-1]["bytes"] = file.seek(0, 2) - layout.chunks[-1]["offset"]
    return layout


def content_problems(file: BinaryIO, chunk: np.void, dtype: str, vocab_size: int) -> list[str]:
    """What is wrong with the numbers of a chunk: token ids beyond the vocabulary, document starts out of order."""
    problems = []
    tokens = Array(dtype, int(chunk["tokens_offset"]), int(chunk["tokens"]))
    bounds = [(int(block.min()), int(block.max())) for block in numbers(file, tokens)]
    lowest, highest = min(low for low, _ in bounds), max(high for _, high in bounds)
    if lowest < 0 or highest >= vocab_size:
        worst = highest if highest >= vocab_size else lowest
        problems.append(f"token id {worst:,} is not below the vocabulary size, expected ids below {vocab_size:,}")
    last = -1
    for block in numbers(file, Array("<i4", int(chunk["docs_offset"]), int(chunk["docs"]))):
        if int(block[0]) <= last or (np.diff(block.astype(np.int64)) <= 0).any():
            problems.append("its document starts do not increase")
            break
        last = int(block[-1])
    if last >= tokens.count:
        problems.append(f"a document starts at token {last:,}, expected one below its {tokens.count:,} tokens")
    if chunk["docs"]:
        first = _first(file, Array("<i4", int(chunk["docs_offset"]), 1))
        if first < 0 or (first > 0) != bool(chunk["flags"] & CONTINUES):
            problems.append(f"its first document starts at token {first:,}, its flags are {chunk['flags']}")
    elif not chunk["flags"] & (CONTINUES | WHOLE):
        problems.append(f"no document starts in it, its flags are {chunk['flags']}, expected {CONTINUES}")
    return problems


def text_bytes(file: BinaryIO, chunk: np.void, dtype: str, byte_lengths: np.ndarray) -> int:
    """The bytes of text behind the tokens of a chunk. `byte_lengths`: of each id, int64[vocabulary]."""
    tokens = Array(dtype, int(chunk["tokens_offset"]), int(chunk["tokens"]))
    return sum(int(byte_lengths[block].sum()) for block in numbers(file, tokens))


def numbers(file: BinaryIO, array: Array) -> Iterator[np.ndarray]:
    """The numbers of an array, a block at a time."""
    dtype = np.dtype(array.dtype)
    for start in range(0, array.count, _BLOCK):
        size = min(_BLOCK, array.count - start) * dtype.itemsize
        file.seek(array.offset + start * dtype.itemsize)
        data = file.read(size)
        if len(data) < size:
            raise ValueError(f"the file ends at byte {file.tell():,}")
        yield np.frombuffer(data, dtype)


def _first(file: BinaryIO, array: Array) -> int:
    return int(next(numbers(file, Array(array.dtype, array.offset, 1)))[0])


def _samples(file: BinaryIO, where: str, ignored: Counter[str]) -> Iterator[tuple[str, dict[str, Array], int]]:
    """Samples with tokens.npy or docs.npy: the key, the arrays, and where the sample ends in the file."""
    key, arrays, end = None, {}, 0
    for member in tar.members(file, where):
        if member.name.lower().endswith(_PICKLES):
            raise ValueError(f"{where}: member {member.name!r} is a pickle, which can run any program: refused")
        name = _SAMPLE_NAME.fullmatch(member.name)
        this_key, kind = (name[1], name[2].lower()) if name else (member.name, "other")
        if this_key != key:
            if arrays:
                yield key, arrays, end
            key, arrays = this_key, {}
        array = _array(file, member, kind, where) if kind == "npy" or kind.endswith(".npy") else None
        if kind in arrays:
            raise ValueError(f"{where}: member {member.name!r} is there twice: write each sample once")
        if kind in DTYPES:
            arrays[kind] = array
        else:
            ignored[kind] += 1
        end = member.end
    if arrays:
        yield key, arrays, end


def _array(file: BinaryIO, member: tar.Member, kind: str, where: str) -> Array | None:
    """The array of a .npy member; None for one that is not ours, once it is known to hold no Python objects."""
    file.seek(member.offset)
    try:
        dtype, count, start = npy.read_header(file.read(min(member.size, npy.MOST_HEADER_BYTES)), member.size)
        if kind in DTYPES and dtype.str not in DTYPES[kind]:
            raise ValueError(f"it holds {dtype}: {_REMEDY[kind]}")
    except ValueError as error:
        if kind not in DTYPES and "Python objects" not in str(error):
            return None
        raise ValueError(f"{where}: member {member.name!r}: {error}") from None
    return Array(dtype.str, member.offset + start, count)
