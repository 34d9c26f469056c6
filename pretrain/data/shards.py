"""Token shards: plain USTAR tar files, written with the same bytes every time, read by position.

Members of a chunk lie next to each other and share a key, so stock `webdataset.WebDataset(path).decode()` reads them:

    00000000.tokens.npy     1-D '<u2' or '<u4', at most chunk_tokens numbers
    00000000.docs.npy       '<i4': where in the chunk documents start; the tokens before the first start continue the
                            last document of the chunk before

A document is never cut between two shards, so every chunk is full but the last one of a shard. Training does not parse
the tar: the sidecar (manifest.CHUNK_DTYPE) says where each chunk lies, and its crc32 is checked when it is first read.
"""

import hashlib
import io
import os
import tarfile
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import numpy as np

from pretrain.data.manifest import CHUNK_DTYPE, CONTINUES, Manifest, Shard, save, sidecar_name
from pretrain.files import write_atomically

OPEN_SHARDS = 128  # files a reader keeps open; a rank reads from about order.LANES of them at a time
TAR_RECORD = tarfile.RECORDSIZE


class ShardReader:
    """Reads windows of tokens by position. Safe to share between threads."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._dtype = np.dtype(manifest.dtype)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: dict[int, bytearray] = {}  # shard -> a flag for each chunk; outlives the open file
        self._buffer = np.zeros((0, 0), dtype=self._dtype)
        self._lock = threading.Lock()

    def read(self, shard: np.ndarray, window: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows int64[k] of shards int64[k] -> tokens uint32[k, seq_len + 1], last_is_target bool[k].

        The last column is the token after the window; where the window ends its chunk, it is 0 and not a target.
        """
        with self._lock:
            rows = self._rows(len(shard), seq_len + 1)
            last_is_target = np.ones(len(shard), dtype=bool)
            for i, (s, w) in enumerate(zip(shard.tolist(), window.tolist(), strict=True)):
                last_is_target[i] = self._shard(s, seq_len).read_window(w, rows[i])
            self._check_ids(rows, shard)
            return rows.astype(np.uint32), last_is_target

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _rows(self, count: int, width: int) -> np.ndarray:
        if self._buffer.shape[1] != width or len(self._buffer) < count:
            self._buffer = np.zeros((count, width), dtype=self._dtype)
        return self._buffer[:count]

    def _check_ids(self, rows: np.ndarray, shard: np.ndarray) -> None:
        if rows.size and int(rows.max()) >= self._manifest.vocab_size:
            bad = int(np.argmax(rows.max(axis=1)))
            path = self._manifest.folder / self._manifest.shards[int(shard[bad])].name
            raise ValueError(
                f"{path}: token id {int(rows[bad].max())} is not below the vocabulary size "
                f"{self._manifest.vocab_size}: write the shards again"
            )

    def _shard(self, number: int, seq_len: int) -> "_OpenShard":
        found = self._open.get(number)
        if found is None:
            chunks = self._manifest.chunks(number)
            checked = self._checked.setdefault(number, bytearray(len(chunks)))
            path = self._manifest.folder / self._manifest.shards[number].name
            found = self._open[number] = _OpenShard(path, chunks, checked, self._dtype)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        found.cut(seq_len)
        return found


class _OpenShard:
    """One open shard of a reader: its file, its chunks, and where the windows of one length lie in them."""

    def __init__(self, path: Path, chunks: np.ndarray, checked: bytearray, dtype: np.dtype):
        self._path, self._checked, self._dtype = path, checked, dtype
        # plain lists: a row costs microseconds, and a NumPy scalar a good part of one
        self._offsets, self._tokens = chunks["tokens_offset"].tolist(), chunks["tokens"].tolist()
        self._crcs = chunks["tokens_crc32"].tolist()
        self._seq_len = 0
        self._file = open(path, "rb", buffering=0)
        self._handle = self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def cut(self, seq_len: int) -> None:
        """Prepare for windows of `seq_len` tokens."""
        if seq_len != self._seq_len:
            self._seq_len = seq_len
            starts = np.cumsum([0] + [tokens // seq_len for tokens in self._tokens])
            self._starts = starts.tolist()  # the first window of each chunk, and the end

    def read_window(self, window: int, row: np.ndarray) -> bool:
        """Fill row[seq_len + 1] with a window and the token after it; False where there is none (row[-1] = 0)."""
        assert 0 <= window < self._starts[-1]
        chunk = bisect_right(self._starts, window) - 1
        if not self._checked[chunk]:
            self._check(chunk)
        start = (window - self._starts[chunk]) * self._seq_len
        offset = self._offsets[chunk] + start * self._dtype.itemsize
        if start + self._seq_len < self._tokens[chunk]:
            self._fill(row, offset, chunk)
            return True
        self._fill(row[:-1], offset, chunk)
        row[-1] = 0
        return False

    def _check(self, chunk: int) -> None:
        tokens = np.empty(self._tokens[chunk], dtype=self._dtype)
        self._fill(tokens, self._offsets[chunk], chunk)
        found, expected = zlib.crc32(tokens), self._crcs[chunk]
        if found != expected:
            raise ValueError(
                f"{self._path} is damaged in chunk {chunk:08d}: crc32 {found:08x} of its tokens where the sidecar says "
                f"{expected:08x}; copy the shard again, or write the shards again"
            )
        self._checked[chunk] = True

    def _fill(self, target: np.ndarray, offset: int, chunk: int) -> None:
        done = os.preadv(self._handle, [target], offset)
        while 0 < done < target.nbytes:  # a signal, or more than one read can bring
            more = os.preadv(self._handle, [memoryview(target).cast("B")[done:]], offset + done)
            done = done + more if more else 0
        if done != target.nbytes:
            raise ValueError(
                f"{self._path} ends before the end of chunk {chunk:08d} ({target.nbytes:,} bytes expected at "
                f"{offset:,}): copy the shard again, or write the shards again"
            )


class ShardWriter:
    """Writes one shard under a temporary name, counting and hashing on the way; `close` gives it its name."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._chunks: list[tuple] = []
        self.tokens = 0

    def add_chunk(self, tokens: np.ndarray, doc_starts: np.ndarray, continues: bool) -> None:
        """Append a chunk: tokens of the shard's dtype, the starts of documents in it, whether it begins inside one."""
        key = f"{len(self._chunks):08d}"
        doc_starts = np.asarray(doc_starts, dtype="<i4")
        tokens_offset = self._add_member(f"{key}.tokens.npy", tokens)
        docs_offset = self._add_member(f"{key}.docs.npy", doc_starts)
        flags = CONTINUES if continues else 0
        self._chunks.append((tokens_offset, len(tokens), zlib.crc32(tokens),
                             docs_offset, len(doc_starts), zlib.crc32(doc_starts), flags))  # fmt: skip
        self.tokens += len(tokens)

    def close(self, text_bytes: int) -> Shard:
        """Finish the file and its sidecar, make them durable, and describe them."""
        end = 2 * tarfile.BLOCKSIZE  # tar: two empty blocks, then filled up to a whole record
        self._write(b"\0" * (end + -(self._position + end) % TAR_RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        chunks = np.array(self._chunks, dtype=CHUNK_DTYPE)
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, chunks, version=(1, 0), allow_pickle=False)
        write_atomically(self._path.with_name(sidecar_name(self._path.name)), buffer.getvalue())
        os.replace(self._temporary, self._path)
        return Shard(
            name=self._path.name,
            bytes=self._position,
            sha256=self._sha256.hexdigest(),
            tokens=self.tokens,
            docs=int(chunks["docs"].sum()),
            text_bytes=text_bytes,
            index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        )

    def abandon(self) -> None:
        """Drop an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, array: np.ndarray) -> int:
        """Write one .npy member; returns the offset of its first number."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        info = tarfile.TarInfo(name)  # owner 0, mode 644, mtime 0: nothing of the machine or the hour
        info.size = len(header.getvalue()) + array.nbytes
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + header.getvalue())
        offset = self._position
        self._write(memoryview(array).cast("B") if array.size else b"")
        self._write(b"\0" * (-self._position % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)


class DatasetWriter:
    """Writes documents into a folder of shards: 00000000.tar, 00000001.tar, ... and index.json at the end.

    A shard is closed after the document that brings it to `shard_tokens` tokens.
    """

    def __init__(self, folder: Path, dtype: str, chunk_tokens: int, shard_tokens: int):
        self._folder, self._shard_tokens = folder, shard_tokens
        self._dtype = dtype
        self._chunk = np.empty(chunk_tokens, dtype=dtype)
        self._filled = 0
        self._doc_starts: list[int] = []
        self._continues = False
        self._text_bytes = 0
        self._shard: ShardWriter | None = None
        self.shards: list[Shard] = []
        self.docs = 0
        self.tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document (its special tokens included), `text_bytes` bytes of text."""
        assert len(tokens) > 0
        if self._shard is None:
            self._shard = ShardWriter(self._folder / f"{len(self.shards):08d}.tar")
        self._doc_starts.append(self._filled)
        done = 0
        while done < len(tokens):
            part = tokens[done : done + len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if self._filled == len(self._chunk):
                self._flush(continues_after=done < len(tokens))
        self.docs += 1
        self.tokens += len(tokens)
        self._text_bytes += text_bytes
        if self._shard.tokens + self._filled >= self._shard_tokens:
            self._close_shard()

    def finish(self, tokenizer_sha256: str, vocab_size: int, special_ids: dict[str, int]) -> Manifest:
        """Close the last shard and write index.json."""
        if self._shard is not None:
            self._close_shard()
        manifest = Manifest(
            folder=self._folder,
            dtype=self._dtype,
            chunk_tokens=len(self._chunk),
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            special_ids=special_ids,
            shards=tuple(self.shards),
        )
        save(manifest)
        return manifest

    def abandon(self) -> None:
        """Stop: drop the unfinished shard, write no index."""
        if self._shard is not None:
            self._shard.abandon()

    def _flush(self, continues_after: bool) -> None:
        if self._filled:
            self._shard.add_chunk(self._chunk[: self._filled], np.array(self._doc_starts), self._continues)
        self._continues = continues_after
        self._filled = 0
        self._doc_starts = []

    def _close_shard(self) -> None:
        self._flush(continues_after=False)
        self.shards.append(self._shard.close(self._text_bytes))
        self._shard = None
        self._text_bytes = 0


def token_dtype(vocab_size: int) -> str:
    """The smallest stored dtype whose numbers reach every id of a vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"
