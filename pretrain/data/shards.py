"""Token shards read by position: windows of tokens out of plain tar files, every byte checked before it is used.

Training does not parse the tar: the sidecar (manifest.CHUNK_DTYPE) says where each chunk lies. When a chunk is first
touched all its bytes are read and their crc32 compared; one that is damaged is fetched again (from a remote store) or
read again, and then is a `BadChunk`.
"""

import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from pretrain.data.manifest import Manifest

OPEN_SHARDS = 128  # files a reader keeps open; a rank reads from about order.LANES of them at a time


class BadChunk(ValueError):
    """A chunk that is damaged and stays so. `shard` and `chunk` are numbers within the data set and the shard."""

    def __init__(self, shard: int, chunk: int, message: str):
        super().__init__(message)
        self.shard, self.chunk = shard, chunk


class ShardReader:
    """Reads windows of tokens by position. Safe to share between threads.

    `bad`: (shard, chunk) pairs that are not read whatever they hold now; those found damaged are added to it.
    """

    def __init__(self, manifest: Manifest, bad: Iterable[tuple[int, int]] = ()):
        self.manifest = manifest
        self.bad = set(bad)
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
                opened = self._shard(s)
                chunk, start = opened.place_of(w, seq_len)
                if not opened.checked[chunk]:
                    opened = self._check(s, chunk)
                last_is_target[i] = opened.read_window(chunk, start, rows[i])
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

    def _shard(self, number: int) -> "_OpenShard":
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        entry, chunks = self.manifest.shards[number], self.manifest.chunks(number)
        file = self.manifest.store.open(entry.name, entry.bytes, entry.sha256)
        checked = self._checked.setdefault(number, bytearray(len(chunks)))
        found = self._open[number] = _OpenShard(file, chunks, checked, self._dtype)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return found

    def _check(self, shard: int, chunk: int) -> "_OpenShard":
        """The shard, opened, with a chunk that is as it was written; `BadChunk` when also a second try finds it is not."""
        where = f"{self.manifest.location}/{self.manifest.shards[shard].name}"
        if (shard, chunk) in self.bad:
            raise BadChunk(shard, chunk, f"chunk {chunk:08d} of {where} is in quarantine")
        problem = self._shard(shard).problem(chunk, self.manifest.vocab_size)
        if problem:
            self._open.pop(shard).close()
            refetched = self.manifest.store.discard(self.manifest.shards[shard].name)
            problem = self._shard(shard).problem(chunk, self.manifest.vocab_size)
            if problem:
                self.bad.add((shard, chunk))
                tried = "fetched again, it was the same" if refetched else "copy the shard again, or write it again"
                raise BadChunk(shard, chunk, f"{where} is damaged in chunk {chunk:08d}: {problem}; {tried}, or go on "
                               "without the chunk: data.quarantine=true")  # fmt: skip
        opened = self._shard(shard)
        opened.checked[chunk] = True
        return opened


class _OpenShard:
    """One open shard of a reader: its file, its chunks, and where the windows of one length lie in them."""

    def __init__(self, file: BinaryIO, chunks: np.ndarray, checked: bytearray, dtype: np.dtype):
        self.checked, self._dtype = checked, dtype
        # plain lists: a row costs microseconds, and a NumPy scalar a good part of one
        self._offsets, self._tokens = chunks["tokens_offset"].tolist(), chunks["tokens"].tolist()
        self._chunks = chunks
        self._seq_len = 0
        self._file = file
        self._handle = file.fileno()

    def close(self) -> None:
        self._file.close()

    def place_of(self, window: int, seq_len: int) -> tuple[int, int]:
        """The chunk of a window of `seq_len` tokens, and its first token in it."""
        if seq_len != self._seq_len:
            self._seq_len = seq_len
            starts = np.cumsum([0] + [tokens // seq_len for tokens in self._tokens])
            self._starts = starts.tolist()  # the first window of each chunk, and the end
        assert 0 <= window < self._starts[-1]
        chunk = bisect_right(self._starts, window) - 1
        return chunk, (window - self._starts[chunk]) * seq_len

    def read_window(self, chunk: int, start: int, row: np.ndarray) -> bool:
        """Fill row[seq_len + 1] with a window and the token after it; False where there is none (row[-1] = 0)."""
        offset = self._offsets[chunk] + start * self._dtype.itemsize
        whole = start + len(row) <= self._tokens[chunk]
        if not whole:
            row[-1] = 0
        self._fill(row if whole else row[:-1], offset)
        return whole

    def problem(self, chunk: int, vocab_size: int) -> str | None:
        """What is wrong with a chunk, or None: all its bytes are read and checked."""
        facts = self._chunks[chunk]
        data = np.empty(int(facts["bytes"]), dtype=np.uint8)
        try:
            self._fill(data, int(facts["offset"]))
        except (ValueError, OSError) as error:
            return str(error)
        if (found := zlib.crc32(data)) != facts["crc32"]:
            return f"crc32 {found:08x} where the sidecar says {facts['crc32']:08x}"
        start = int(facts["tokens_offset"] - facts["offset"])
        highest = int(np.frombuffer(data, self._dtype, int(facts["tokens"]), start).max(initial=0))
        return f"token id {highest} is not below the vocabulary size {vocab_size}" if highest >= vocab_size else None

    def _fill(self, target: np.ndarray, offset: int) -> None:
        done = os.preadv(self._handle, [target], offset)
        while 0 < done < target.nbytes:  # a signal, or more than one read can bring
            more = os.preadv(self._handle, [memoryview(target).cast("B")[done:]], offset + done)
            done = done + more if more else 0
        if done != target.nbytes:
            raise ValueError(f"the file ends before byte {offset + target.nbytes:,}")
