"""Files compressed with gzip (.gz) or Zstandard (.zst) as streams; a cut or damaged one is never taken for whole."""

import codecs
import gzip
import io
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

READ = (".gz", ".zst", ".parquet")
MAGIC = {  # the first bytes of files of a kind, as no text begins
    ".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".parquet": rb"PAR1[\x00-\x1f]", ".zip": rb"PK\x03\x04",
    ".pdf": rb"%PDF-[12]\.", ".bz2": rb"BZh[1-9]1AY&", ".xz": rb"\xfd7zXZ\x00",
}  # fmt: skip
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)  # what reading a damaged file raises


def is_compressed(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() in (".gz", ".zst")


def content_suffix(path: Path) -> str:
    """The suffix of what is inside: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    inner = path.with_suffix("") if is_compressed(path) else path
    return inner.suffix.lower()


def check_content(path: Path, file: BinaryIO) -> None:
    """`ValueError` where the first bytes of an open file are of another kind than its name says, with what to do."""
    head = file.read(8)
    file.seek(0)
    suffix, content = path.suffix.lower(), content_suffix(path)
    if content in (".gz", ".zst"):
        unpack = "gunzip -k" if suffix == ".gz" else "zstd -d"
        raise ValueError(f"{path} is compressed twice: run `{unpack} {path}` first")
    if not head:
        return
    kind = next((kind for kind, start in MAGIC.items() if re.match(start, head)), None)
    if kind and kind != suffix:
        raise ValueError(f"{path} holds {kind} data, and its name does not say so: run `mv {path} {path}{kind}`"
                         f"{'' if kind in READ else ', and unpack it'}")  # fmt: skip
    if kind is None and is_compressed(path):
        raise ValueError(f"{path} holds no {suffix} data: give it the name of what it is")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16, not UTF-8: convert it, as with iconv -f UTF-16 -t UTF-8")


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
