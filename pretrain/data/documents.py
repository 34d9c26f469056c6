"""Raw input to documents: text files, JSONL files, both also as .gz or .zst; what went in is counted.

A text file is one document; each line of a .jsonl file is one. A folder is walked in sorted order. Documents are read
one at a time, so memory grows with the longest document, not with the corpus.
"""

import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .pl .r .jl .sh .sql .lua "
    ".scala .kt .swift .html .css .jsonl".split()
)
COMPRESSED_SUFFIXES = (".gz", ".zst")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot


@dataclass(frozen=True)
class InputFile:
    """A file to read; `bytes` is its size on disk."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class Document:
    """A text, and how many bytes of input (on disk) were read since the document before."""

    text: str
    input_bytes: int


@dataclass
class Counts:
    """What reading met: documents, empty ones (left out), and those with invalid characters (replaced by U+FFFD)."""

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    invalid_files: list[Path] = field(default_factory=list)  # the first few

    def summary(self) -> str:
        """What a user should know of, or an empty string."""
        notes = [f"{self.empty:,} empty documents left out"] if self.empty else []
        if self.invalid:
            names = ", ".join(map(str, self.invalid_files))
            notes.append(f"{self.invalid:,} documents with invalid UTF-8, replaced by U+FFFD (first: {names})")
        return "; ".join(notes)


def find_files(
    inputs: Sequence[str | Path], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[InputFile]:
    """The files to read, in order. A file named outright is always taken; of a folder, those with a text suffix, or
    those that match a glob of `include`, less those that match one of `exclude` (path within the folder, or a part).
    """
    found: list[Path] = []
    for item in map(Path, inputs):
        if item.is_file():
            found.append(item)
        elif item.is_dir():
            found += _walk(item, include, exclude)
        else:
            raise ValueError(f"input {item} is not a file or a folder")
    if not found:
        wanted = f"matches {' '.join(include)}" if include else "has a text suffix (.txt, .py, .jsonl, .txt.gz, ...)"
        raise ValueError(f"no file under {' '.join(map(str, inputs))} {wanted}: choose files with --include GLOB")
    return [InputFile(path, path.stat().st_size) for path in dict.fromkeys(found)]


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        inside = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _matches(inside / name, exclude))
        for name in sorted(names):
            path = inside / name
            taken = _matches(path, include) if include else _content_suffix(path) in TEXT_SUFFIXES
            if taken and not _matches(path, exclude) and (folder / path).is_file():
                yield folder / path


def _matches(path: Path, globs: Sequence[str]) -> bool:
    names = (path.as_posix(), *path.parts)
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)


def _content_suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return inner.suffix.lower()


def is_held_out(data: bytes, fraction: float) -> bool:
    """Whether a document (its text in UTF-8) is of the validation split: by its hash, whatever its place or name."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") < fraction * 2**64


def read_documents(files: Sequence[InputFile], text_key: str, counts: Counts) -> Iterator[Document]:
    """The documents of `files` that are not empty, in order, counted in `counts`.

    `text_key` names the field of a JSONL line that holds the text. `ValueError` for what cannot be read, with its file.
    """
    unreported = 0  # bytes of input whose documents were empty
    for file in files:
        for text, read in _read_file(file, text_key, counts):
            unreported += read
            if text:
                counts.documents += 1
                yield Document(text, unreported)
                unreported = 0
            else:
                counts.empty += 1


def _read_file(file: InputFile, text_key: str, counts: Counts) -> Iterator[tuple[str, int]]:
    position = 0
    with open(file.path, "rb") as raw:
        stream = _decompressed(file.path, raw)
        try:
            if _content_suffix(file.path) == ".jsonl":
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        record = _decode(line, file.path, counts)
                        text = _json_text(record, file.path, number, text_key)
                        yield _clean(text, file.path, counts), raw.tell() - position
                        position = raw.tell()
            else:
                yield _decode(stream.read(), file.path, counts), file.bytes
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise ValueError(f"{file.path} is damaged or cut short: {error}") from None


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


def _json_text(line: str, path: Path, number: int, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}, line {number}: no field {text_key!r} (there is: {keys}); name it with --text-key")
    if not isinstance(record[text_key], str):
        raise ValueError(f"{path}, line {number}: field {text_key!r} is not text; name the right one with --text-key")
    return record[text_key]


def _decode(data: bytes, path: Path, counts: Counts) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        _count_invalid(path, counts)
        return data.decode("utf-8", "replace")


def _clean(text: str, path: Path, counts: Counts) -> str:
    cleaned = _SURROGATE.sub("\ufffd", text)
    if cleaned != text:
        _count_invalid(path, counts)
    return cleaned


def _count_invalid(path: Path, counts: Counts) -> None:
    counts.invalid += 1
    if len(counts.invalid_files) < 3 and path not in counts.invalid_files:
        counts.invalid_files.append(path)
