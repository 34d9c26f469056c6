"""Token shards read by position: windows of tokens out of plain tar files, every byte checked before it is used.

Training does not parse the tar: the sidecar (sidecar.CHUNK_DTYPE) says where each chunk lies. When a chunk is first
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

from pretrain.shards.manifest import Manifest
from pretrain.shards.sidecar import CONTINUES

OPEN_SHARDS = 128  # files a reader keeps open; a rank reads from about order.LANES of them at a time
KEPT_STARTS = 1 << 23  # numbers of document starts that a reader keeps, 64 MiB


class BadChunk(ValueError):
    """A chunk that is damaged and stays so. `shard` and `chunk` are numbers within the data set and the shard."""

    def __init__(self, shard: int, chunk: int, message: str):
        super().__init__(message)
        self.shard, self.chunk = shard, chunk


class ShardReader:
    """Reads tokens by position, and where documents start. Safe to share between threads.

    `bad`: (shard, chunk) pairs that are not read whatever they hold now; those found damaged are added to it.
    """

    def __init__(self, manifest: Manifest, bad: Iterable[tuple[int, int]] = ()):
        self.manifest = manifest
        self.bad = set(bad)
        self._dtype = np.dtype(manifest.dtype)
        self._open: dict[int, _OpenShard] = {}
        self._checked: dict[int, bytearray] = {}  # shard -> a flag for each chunk; outlives the open file
        self._starts: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()  # (shard, chunk) -> document starts
        self._starts_kept = 0
        self._lock = threading.Lock()

    def read(
        self, shard: np.ndarray, window: np.ndarray, seq_len: int, whole_len: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Windows int64[k] of shards int64[k] -> tokens [k, seq_len + 1] of the stored dtype, last_is_target bool[k].

        The last column is the token after the window; where the window ends its chunk, it is 0 and not a target. With
        `whole_len` the windows are the pieces of those of that many tokens.
        """
        whole_len = whole_len or seq_len
        with self._lock:
            rows = np.empty((len(shard), seq_len + 1), dtype=self._dtype)
            last_is_target = np.ones(len(shard), dtype=bool)
            for i, (s, w) in enumerate(zip(shard.tolist(), window.tolist(), strict=True)):
                opened = self._open.get(s) or self._shard(s)
                chunk, offset, has_next = opened.find(w, seq_len, whole_len)
                if not opened.checked[chunk] or (self.bad and (s, chunk) in self.bad):
                    opened = self._check(s, chunk)
                row = rows[i]
                if not has_next:
                    row[-1], row, last_is_target[i] = 0, row[:-1], False
                opened.fill(row, offset)
            return rows, last_is_target

    def read_segments(self, segments: Iterable[tuple[int, int, int, int, int]], target: np.ndarray) -> None:
        """Fill pieces of `target` (1-D, of the stored dtype) with tokens that each lie within one chunk.

        A segment is (shard, chunk, first token in the chunk, first place in `target`, how many).
        """
        assert target.ndim == 1 and target.dtype == self._dtype and target.flags.c_contiguous
        with self._lock:
            for shard, chunk, start, place, length in segments:
                self._checked_shard(shard, chunk).read_tokens(chunk, start, target[place : place + length])

    def places(self, shard: np.ndarray, window: np.ndarray, seq_len: int, whole_len: int) -> list[tuple[int, int]]:
        """The chunk of each window, and its first token in the chunk; the windows are those of `read`."""
        with self._lock:
            places = zip(shard.tolist(), window.tolist(), strict=True)
            return [(self._open.get(s) or self._shard(s)).place_of(w, seq_len, whole_len) for s, w in places]

    def document_starts(self, shard: int, chunk: int) -> np.ndarray:
        """Where documents start in a chunk, int64[n], ascending; without a 0 its first tokens continue a document."""
        with self._lock:
            opened = self._checked_shard(shard, chunk)
            if (found := self._starts.get((shard, chunk))) is not None:
                self._starts.move_to_end((shard, chunk))
                return found
            found = self._starts[shard, chunk] = opened.read_starts(chunk)
            self._starts_kept += len(found) + 1
            while self._starts_kept > KEPT_STARTS and len(self._starts) > 1:
                self._starts_kept -= len(self._starts.popitem(last=False)[1]) + 1
            return found

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _shard(self, number: int) -> "_OpenShard":
        if number in self._open:
            return self._open[number]
        entry, chunks = self.manifest.shards[number], self.manifest.chunks(number)
        file = self.manifest.store.open(entry.name, entry.bytes, entry.sha256)
        checked = self._checked.setdefault(number, bytearray(len(chunks)))
        name = f"{self.manifest.location}/{entry.name}"
        found = self._open[number] = _OpenShard(name, file, chunks, checked, self._dtype)
        if len(self._open) > OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()  # opened longest ago: lanes move on, they do not come back
        return found

    def _checked_shard(self, shard: int, chunk: int) -> "_OpenShard":
        opened = self._shard(shard)
        if not opened.checked[chunk] or (self.bad and (shard, chunk) in self.bad):  # others may have found it bad later
            return self._check(shard, chunk)
        return opened

    def _check(self, shard: int, chunk: int) -> "_OpenShard":
        """The shard, opened, with the chunk found intact; `BadChunk` when it is damaged, also at a second try."""
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

    def __init__(self, name: str, file: BinaryIO, chunks: np.ndarray, checked: bytearray, dtype: np.dtype):
        self._name, self.checked, self._dtype, self._itemsize = name, checked, dtype, np.dtype(dtype).itemsize
        # plain lists: a row costs microseconds, and a NumPy scalar a good part of one
        self._offsets, self._tokens = chunks["tokens_offset"].tolist(), chunks["tokens"].tolist()
        self._chunks = chunks
        self._whole_len = 0
        self._file = file
        self._handle = file.fileno()

    def close(self) -> None:
        self._file.close()

    def place_of(self, window: int, seq_len: int, whole_len: int) -> tuple[int, int]:
        """The chunk of a window of `seq_len` tokens, a piece of one of `whole_len`, and its first token in it."""
        if whole_len != self._whole_len:
            self._whole_len = whole_len
            starts = np.cumsum([0] + [tokens // whole_len for tokens in self._tokens])
            self._starts = starts.tolist()  # the first whole of each chunk, and the end
        whole, piece = (window, 0) if whole_len == seq_len else divmod(window, whole_len // seq_len)
        assert 0 <= whole < self._starts[-1]
        chunk = bisect_right(self._starts, whole) - 1
        return chunk, (whole - self._starts[chunk]) * whole_len + piece * seq_len

    def find(self, window: int, seq_len: int, whole_len: int) -> tuple[int, int, bool]:
        """The chunk of a window, the byte of the file it begins at, and whether a token of the chunk follows it."""
        chunk, start = self.place_of(window, seq_len, whole_len)
        return chunk, self._offsets[chunk] + start * self._itemsize, start + seq_len < self._tokens[chunk]

    def read_tokens(self, chunk: int, start: int, target: np.ndarray) -> None:
        self.fill(target, self._offsets[chunk] + start * self._itemsize)

    def read_starts(self, chunk: int) -> np.ndarray:
        """The document starts of a chunk. The first token of a shard starts a document, and that of a chunk which does
        not continue one: the shards of others may not list it."""
        facts = self._chunks[chunk]
        stored = np.empty(int(facts["docs"]), dtype="<i4")
        self.fill(stored, int(facts["docs_offset"]))
        starts = stored.astype(np.int64)
        tokens = self._tokens[chunk]
        if len(starts) and (starts[0] < 0 or starts[-1] >= tokens or (np.diff(starts) <= 0).any()):
            raise ValueError(f"{self._name}: the document starts of chunk {chunk:08d} are not ascending numbers below "
                             f"its {tokens:,} tokens: write the shards again")  # fmt: skip
        begins = chunk == 0 or not facts["flags"] & CONTINUES
        return np.concatenate([[0], starts]) if begins and tokens and (not len(starts) or starts[0]) else starts

    def problem(self, chunk: int, vocab_size: int) -> str | None:
        """What is wrong with a chunk, or None: all its bytes are read and checked."""
        facts = self._chunks[chunk]
        data = np.empty(int(facts["bytes"]), dtype=np.uint8)
        try:
            self.fill(data, int(facts["offset"]))
        except (ValueError, OSError) as error:
            return str(error)
        if (found := zlib.crc32(data)) != facts["crc32"]:
            return f"crc32 {found:08x} where the sidecar says {facts['crc32']:08x}"
        start = int(facts["tokens_offset"] - facts["offset"])
        highest = int(np.frombuffer(data, self._dtype, int(facts["tokens"]), start).max(initial=0))
        return f"token id {highest} is not below the vocabulary size {vocab_size}" if highest >= vocab_size else None

    def fill(self, target: np.ndarray, offset: int) -> None:
        """Fill an array with the bytes of the file from `offset` on."""
        done = os.preadv(self._handle, (target,), offset)
        if done == target.nbytes:
            return
        while 0 < done < target.nbytes:  # a signal, or more than one read can bring
            more = os.preadv(self._handle, [memoryview(target).cast("B")[done:]], offset + done)
            done = done + more if more else 0
        if done != target.nbytes:
            raise ValueError(f"the file ends before byte {offset + target.nbytes:,}")
