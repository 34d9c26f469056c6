"""One input file to its raw documents: whole texts, lines of JSONL, rows of Parquet, members of a WebDataset tar.

Everything is streamed, and nothing that a file claims of itself is believed: a document is read up to a limit (a few
kilobytes of .gz can unpack to terabytes), a tar is walked and never extracted, and nothing is unpickled.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from pretrain.examples import parquet
from pretrain.examples.decompress import decompressed
from pretrain.examples.formats import opened
from pretrain.shards import tar

MAX_DOCUMENT_BYTES = 4 * 2**30  # of text, after decompression
MAX_MEMBER_BYTES = 2**30  # of a text in a tar
_BLOCK = 1 << 20


class Raw(NamedTuple):
    """A document as it lies in the file, and how far (in bytes on disk, from the start of the piece) reading is."""

    data: bytes
    part: str  # which one it is: "line 12", "row 7", "member a/b.txt"; "byte 99" in a byte range; "" for a whole file
    position: int
    is_json: bool = False


class Ignored(NamedTuple):
    """A member of a tar that is not a document."""

    name: str


def whole(path: Path) -> Iterator[Raw]:
    """The file as one document."""
    with open(path, "rb") as raw:
        stream, blocks, size = decompressed(path, raw), [], 0
        while block := stream.read(_BLOCK):
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{path}: {_too_long(MAX_DOCUMENT_BYTES)}")
        yield Raw(b"".join(blocks), "", raw.tell())


def lines(path: Path, start: int, end: int) -> Iterator[Raw]:
    """The lines that start in the bytes [start, end) of a JSONL file; a compressed file is read whole."""
    with open(path, "rb") as raw:
        stream = decompressed(path, raw)
        is_plain = stream is raw
        offset = number = 0
        if start:
            raw.seek(start - 1)
            offset = start - 1 + _skip_line(raw)
        while not is_plain or offset < end:
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            number += 1
            part = f"byte {offset}" if start else f"line {number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{path}, {part}: {_too_long(MAX_DOCUMENT_BYTES)}")
            offset += len(line)
            if line.strip():
                yield Raw(line, part, (min(offset, end) if is_plain else raw.tell()) - start, is_json=True)


def _skip_line(raw: BinaryIO) -> int:
    size = 0
    while line := raw.readline(_BLOCK):
        size += len(line)
        if line.endswith(b"\n"):
            break
    return size


def line_number(path: Path, offset: int) -> int:
    """The number of the line of an uncompressed file that starts at a byte, counted from 1."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def rows(path: Path, column: str) -> Iterator[Raw]:
    """The values of a column of text of a Parquet file; a null is an empty document."""
    size = os.path.getsize(path)
    for number, (total, value) in enumerate(parquet.texts(path, column), 1):
        yield Raw(value, f"row {number}", size * number // total)


def table(path: Path) -> Iterator[Raw]:
    """The rows of a .json, .csv or .tsv file, each as an object."""
    size, before = os.path.getsize(path), None
    unit, rows = opened(path)
    for number, row in rows:
        if before is not None:
            yield before
        before = Raw(json.dumps(row).encode(), f"{unit} {number}", 0, is_json=True)
    if before is not None:
        yield before._replace(position=size)


def members(path: Path) -> Iterator[Raw | Ignored]:
    """The .txt and .json members of an uncompressed WebDataset tar. In a sample (adjacent members that share the name
    up to the first dot) with a .txt, the .json holds facts about the text, not a text.
    """
    with open(path, "rb") as file:
        for _, sample in tar.samples(file, str(path)):
            suffixes = [_suffix(member.name) for member in sample]
            wanted = ".txt" if ".txt" in suffixes else ".json"
            for member, suffix in zip(sample, suffixes, strict=True):
                if suffix == wanted:
                    yield Raw(_member_data(file, member, path), f"member {member.name}", member.end, suffix == ".json")
                else:
                    yield Ignored(member.name)


def _suffix(name: str) -> str:
    path = PurePosixPath(name)
    return "" if path.name.startswith(".") else path.suffix.lower()  # macOS adds hidden "._a.txt" that are not text


def _member_data(file: BinaryIO, member: tar.Member, path: Path) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"{path}: member {member.name!r}: {_too_long(MAX_MEMBER_BYTES)}")
    file.seek(member.offset)
    return file.read(member.size)


def _too_long(limit: int) -> str:
    return (
        f"a text of more than {limit / 2**30:g} GiB, which is no document (and may be made to fill the memory): "
        "cut it into documents, or leave it out"
    )
