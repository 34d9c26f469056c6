"""Files compressed with gzip (.gz) or Zstandard (.zst) as streams; a cut or damaged one is never taken for whole."""

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)  # what reading a damaged file raises


def is_compressed(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() in (".gz", ".zst")


def content_suffix(path: Path) -> str:
    """The suffix of what is inside: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    inner = path.with_suffix("") if is_compressed(path) else path
    return inner.suffix.lower()


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of the open file `raw`, by the suffix of its name; an uncompressed file is returned as it is."""
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
