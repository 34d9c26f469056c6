"""One input file to its raw documents: whole texts, lines of JSONL, rows of Parquet, members of a WebDataset tar.

Everything is streamed, and nothing that a file claims of itself is believed: a document is read up to a limit (a few
kilobytes of .gz can unpack to terabytes), a tar is walked and never extracted, and nothing is unpickled.
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import zstandard

from pretrain.data import tar

MAX_DOCUMENT_BYTES = 4 * 2**30  # of text, after decompression
MAX_MEMBER_BYTES = 2**30  # of a text in a tar
PICKLES = frozenset({"pyd", "pkl", "pickle"})
PARQUET_ROWS = 64  # read at once; long rows must fit in memory together
_BLOCK = 1 << 20
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


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
        stream, blocks, size = _decompressed(path, raw), [], 0
        while block := stream.read(_BLOCK):
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{path}: {_too_long(MAX_DOCUMENT_BYTES)}")
        yield Raw(b"".join(blocks), "", raw.tell())


def lines(path: Path, start: int, end: int) -> Iterator[Raw]:
    """The lines that start in the bytes [start, end) of a JSONL file; a compressed file is read whole."""
    with open(path, "rb") as raw:
        stream = _decompressed(path, raw)
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
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'pretrain[prepare]'") from None

    size = os.path.getsize(path)
    try:
        with parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=_BLOCK, page_checksum_verification=True
        ) as file:
            _check_column(file.schema_arrow, column, path, pyarrow.types)
            number, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False):
                values = batch.column(0)
                if pyarrow.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                # As bytes: pyarrow does not check that text is valid UTF-8.
                for value in values.cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    yield Raw(value or b"", f"row {number}", size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from None


def _check_column(schema, column: str, path: Path, types) -> None:
    if column not in schema.names:
        names = ", ".join(schema.names[:20])
        raise ValueError(f"{path}: no column {column!r} (there is: {names}); name it with --text-key")
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{path}: column {column!r} is {kind}, not text; name the right one with --text-key")


def members(path: Path) -> Iterator[Raw | Ignored]:
    """The .txt and .json members of an uncompressed WebDataset tar. In a sample (adjacent members that share the name
    up to the first dot) with a .txt, the .json holds facts about the text, not a text.
    """
    with open(path, "rb") as file:
        for _, sample in groupby(tar.members(file, str(path)), lambda member: _sample_key(member.name)):
            sample = list(sample)
            suffixes = [_suffix(member.name) for member in sample]
            wanted = ".txt" if ".txt" in suffixes else ".json"
            for member, suffix in zip(sample, suffixes, strict=True):
                if PICKLES & set(member.name.lower().rpartition("/")[2].split(".")[1:]):
                    raise ValueError(
                        f"{path}: member {member.name!r} is a pickle, which can run any code when it is loaded: refused"
                    )
                if suffix == wanted:
                    yield Raw(_member_data(file, member, path), f"member {member.name}", member.end, suffix == ".json")
                else:
                    yield Ignored(member.name)


def _suffix(name: str) -> str:
    path = PurePosixPath(name)
    return "" if path.name.startswith(".") else path.suffix.lower()  # macOS adds hidden "._a.txt" that are not text


def _sample_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


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


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames; unlike the library's own reader it does not take a cut file for a whole one."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False  # inside a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._started:
                    raise EOFError("the zstd stream ends in the middle")
                return 0
            self._started = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
