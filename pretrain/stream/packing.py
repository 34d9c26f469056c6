"""Documents -> rows of T + 1 tokens: T inputs, and the token after each. How a shard is cut is a plan, so rows can be
read in any order.

`Windows` takes contiguous windows inside a chunk and knows no documents unless asked. `BestFit` packs whole documents
into rows by best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024): a document that
fits into a row is never cut, a longer one gives full rows that overlap by one token, so that every token but its first
is a target once; its rest is packed like a document.

The plan of best_fit is made once for each data set and T, shard by shard, and kept below `cache_folder`:

    packing-FINGERPRINT-T/00000000.bin      SEGMENT_DTYPE[segments] of shard 0, row after row
    packing-FINGERPRINT-T/rows.bin          int64[2, shards]: rows, and row places that hold tokens

Each file ends with a sha256 of its content and of what it belongs to; one that is damaged is made again.
"""

import fcntl
import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain.files import write_atomically
from pretrain.shards.cache import make_folder
from pretrain.shards.reader import OPEN_SHARDS, BadChunk, ShardReader
from pretrain.stream.order import hash_key, permutation

PADDING = -1  # the document of a row place that holds no token
# A segment is `length` tokens of a chunk from `start` on. It begins a new row, a new piece (a document, or a part of a
# long one), or goes on with the piece in the next chunk.
SEGMENT_DTYPE = np.dtype([("chunk", "<i4"), ("start", "<i4"), ("length", "<i4"), ("flags", "<u4")])
BEGINS_PIECE, BEGINS_ROW = 1, 2
DIGEST_BYTES = 32
PLAN_FORMAT = 1  # part of every digest: raise it with any change of the plan


class Windows:
    """Contiguous windows of T tokens inside a chunk. With documents, the first token of one is not a target."""

    fill_rate = 1.0  # share of the row places that hold tokens

    def __init__(
        self, reader: ShardReader, seq_len: int, want_documents: bool, cache_folder: Path | None = None,
        whole_len: int = 0,
    ):  # fmt: skip
        """Rows of `seq_len` tokens; with `whole_len` pieces of windows of that many, row by row and shard by shard."""
        self._reader, self._seq_len, self._want_documents = reader, seq_len, want_documents
        self._whole_len = whole_len = whole_len or seq_len
        self.rows_per_shard = reader.manifest.windows_per_shard(whole_len) * (whole_len // seq_len)
        # tokens that no window of this length holds: the ends of chunks
        self.unused_tokens = reader.manifest.tokens - int(self.rows_per_shard.sum()) * seq_len

    def read(self, shard: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Rows int64[k] of shards int64[k] -> tokens [k, T + 1], is_target bool[k, T], documents int32[k, T + 1].

        `documents` numbers the documents of a row from 0 on, -1 where there is none; None unless asked for.
        """
        tokens, last_is_target = self._reader.read(shard, row, self._seq_len, self._whole_len)
        if not self._want_documents:
            is_target = np.ones((len(tokens), self._seq_len), dtype=bool)
            is_target[:, -1] = last_is_target
            return tokens, is_target, None
        documents = self._documents(shard, row)
        documents[~last_is_target, -1] = PADDING
        return tokens, targets(documents), documents

    def chunks_of(self, shard: int, row: int) -> list[int]:
        """The chunks that a row is read from."""
        return [self._reader.places(np.array([shard]), np.array([row]), self._seq_len, self._whole_len)[0][0]]

    def _documents(self, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        begins = np.zeros((len(shard), self._seq_len + 1), dtype=np.int32)
        places = self._reader.places(shard, row, self._seq_len, self._whole_len)
        for i, (s, (chunk, start)) in enumerate(zip(shard.tolist(), places, strict=True)):
            starts = self._reader.document_starts(s, chunk)
            first, end = starts.searchsorted((start + 1, start + self._seq_len + 1))
            begins[i, starts[first:end] - start] = 1
        return begins.cumsum(axis=1, dtype=np.int32)


class BestFit:
    """Whole documents packed into rows; see above. `rows_per_shard` int64[shards]; no token is left unused.

    Making the plan reads and checks every chunk, and `BadChunk` passes through: a plan without it would be another one.
    """

    unused_tokens = 0

    def __init__(self, reader: ShardReader, seq_len: int, want_documents: bool, cache_folder: Path | None):
        if cache_folder is None:
            raise ValueError(
                "data.packing=best_fit keeps its plan in a folder, and there is none: set data.cache to one with room "
                "for about 16 bytes a document, or take data.packing=window"
            )
        self._reader, self._want_documents = reader, want_documents
        self._plans = Plans(reader, seq_len, Path(cache_folder))
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._width = seq_len + 1
        self._dtype = np.dtype(reader.manifest.dtype)
        self._pad = reader.manifest.special_ids.get("pad", 0)
        self.rows_per_shard, filled = self._plans.rows()
        self.fill_rate = int(filled.sum()) / (int(self.rows_per_shard.sum()) * self._width)

    def read(self, shard: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """As `Windows.read`; pieces of one document in a row count as different documents."""
        found = [self._segments(s, r) for s, r in zip(shard.tolist(), row.tolist(), strict=True)]
        counts = np.array([len(part) for part in found], dtype=np.int64)
        segments = np.concatenate(found) if found else np.empty(0, SEGMENT_DTYPE)
        rows = np.repeat(np.arange(len(shard)), counts)
        lengths = segments["length"].astype(np.int64)
        row_starts = np.cumsum(counts) - counts
        ends = np.cumsum(lengths)
        places = ends - lengths  # as if the rows lay end to end without padding, and then moved to where they begin
        places += rows * self._width - places[row_starts][rows]
        tokens = np.full((len(shard), self._width), self._pad, dtype=self._dtype)
        columns = (shard[rows], segments["chunk"], segments["start"], places, lengths)
        self._reader.read_segments(zip(*(column.tolist() for column in columns), strict=True), tokens.reshape(-1))
        pieces = np.cumsum(segments["flags"] & BEGINS_PIECE, dtype=np.int64)
        numbers = pieces - pieces[row_starts][rows]
        documents = np.full((len(shard), self._width), PADDING, dtype=np.int32)
        filled = np.add.reduceat(lengths, row_starts) if len(shard) else np.zeros(0, dtype=np.int64)
        documents[np.arange(self._width) < filled[:, None]] = np.repeat(numbers, lengths)
        return tokens, targets(documents), documents if self._want_documents else None

    def chunks_of(self, shard: int, row: int) -> list[int]:
        """As `Windows.chunks_of`."""
        return sorted(set(self._segments(shard, row)["chunk"].tolist()))

    def _segments(self, shard: int, row: int) -> np.ndarray:
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                segments = self._plans.open(shard)
                starts = np.flatnonzero(segments["flags"] & BEGINS_ROW).astype(np.int32)
                found = self._open[shard] = segments, np.append(starts, np.int32(len(segments)))
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
        segments, starts = found
        assert 0 <= row < len(starts) - 1
        return segments[starts[row] : starts[row + 1]]


PACKINGS = {"window": Windows, "best_fit": BestFit}


def targets(documents: np.ndarray) -> np.ndarray:
    """int32[k, T + 1] -> bool[k, T]: whether the token after each one belongs to the same document."""
    return (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != PADDING)


class Plans:
    """The plans of all shards of a data set for one row length, on disk; made by one process while others wait."""

    def __init__(self, reader: ShardReader, seq_len: int, cache_folder: Path):
        self._reader, self._manifest, self._seq_len = reader, reader.manifest, seq_len
        self._folder = cache_folder / f"packing-{self._manifest.fingerprint[:16]}-{seq_len}"

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """int64[shards] each: how many rows, and how many of their places hold tokens. Makes what is missing."""
        found = self._load("rows", np.dtype("<i8"))
        if found is None:
            with self._locked():
                found = self._load("rows", np.dtype("<i8"))  # another process may have made it meanwhile
                if found is None:
                    found = self._make_all()
        rows, filled = found.reshape(2, -1)
        return rows, filled

    def open(self, shard: int) -> np.ndarray:
        """The plan of a shard, SEGMENT_DTYPE[segments], mapped into memory."""
        name = f"{shard:08d}"
        if self._load(name) is None:
            with self._locked():
                if self._load(name) is None:
                    self._save(name, plan(self._reader, shard, self._seq_len))
        path = self._folder / f"{name}.bin"
        rows = (path.stat().st_size - DIGEST_BYTES) // SEGMENT_DTYPE.itemsize
        if not rows:
            return np.empty(0, SEGMENT_DTYPE)
        return np.memmap(path, SEGMENT_DTYPE, "r", shape=(rows,)).view(np.ndarray)

    def _make_all(self) -> np.ndarray:
        count = len(self._manifest.shards)
        found = np.zeros((2, count), dtype=np.int64)
        with tqdm(total=self._manifest.tokens, unit="tok", unit_scale=True, desc="packing") as bar:
            for shard, entry in enumerate(self._manifest.shards):
                if shard + 1 < count:
                    following = self._manifest.shards[shard + 1]
                    self._manifest.store.prefetch(following.name, following.bytes, following.sha256)
                segments = self._load(f"{shard:08d}")  # there when making the plan was broken off
                if segments is None:
                    segments = plan(self._reader, shard, self._seq_len)
                    self._save(f"{shard:08d}", segments)
                found[0, shard] = np.count_nonzero(segments["flags"] & BEGINS_ROW)
                found[1, shard] = segments["length"].sum(dtype=np.int64)
                bar.update(entry.tokens)
        self._save("rows", found)
        return found

    def _key(self, name: str) -> bytes:
        return f"{PLAN_FORMAT}/{self._manifest.fingerprint}/{self._seq_len}/{name}/".encode()

    def _save(self, name: str, array: np.ndarray) -> None:
        data = array.tobytes()
        write_atomically(self._folder / f"{name}.bin", data + hashlib.sha256(self._key(name) + data).digest())

    def _load(self, name: str, dtype: np.dtype = SEGMENT_DTYPE) -> np.ndarray | None:
        """What was saved under a name; None where it is missing or damaged."""
        try:
            data = (self._folder / f"{name}.bin").read_bytes()
        except FileNotFoundError:
            return None
        content = memoryview(data)[:-DIGEST_BYTES]
        digest = hashlib.sha256(self._key(name))
        digest.update(content)
        if digest.digest() != data[-DIGEST_BYTES:]:
            return None
        return np.frombuffer(content, dtype)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes on this file system; the lock ends with the process, however it ends."""
        make_folder(self._folder)
        with open(self._folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"waiting for another process that packs {self._manifest.location} into {self._folder}"
                tqdm.write(message, file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def plan(reader: ShardReader, shard: int, seq_len: int) -> np.ndarray:
    """The rows of a shard, SEGMENT_DTYPE[segments]: a function of its documents and `seq_len` alone.

    The rows are mixed: best fit makes those of long documents first, and they would be trained on first.
    """
    if reader.manifest.shards[shard].tokens == 0:
        return np.empty(0, dtype=SEGMENT_DTYPE)
    chunk_ends = np.cumsum(reader.manifest.chunks(shard)["tokens"])
    chunk_starts = np.concatenate([[0], chunk_ends[:-1]])
    try:
        starts = [reader.document_starts(shard, chunk) + start for chunk, start in enumerate(chunk_starts.tolist())]
    except BadChunk as error:
        remedy = "the plan of data.packing=best_fit needs every chunk; data.packing=window does not"
        raise BadChunk(error.shard, error.chunk, f"{error} ({remedy})") from None
    starts = np.concatenate(starts)
    starts, lengths = cut(starts, np.diff(starts, append=chunk_ends[-1]), seq_len)
    placed, row = best_fit_decreasing(lengths, seq_len + 1)
    rows = int(row.max(initial=-1)) + 1
    row = permutation(hash_key(seq_len, shard), rows)[row]
    in_order = np.argsort(row, kind="stable")
    row, placed = row[in_order], placed[in_order]
    return _split_by_chunk(starts[placed], lengths[placed], row, chunk_starts, chunk_ends)


def cut(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of documents -> of pieces of at most `seq_len` + 1 tokens; each overlaps the next by one."""
    pieces = np.maximum(1, -(-(lengths - 1) // seq_len))
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = number * seq_len
    return np.repeat(starts, pieces) + offsets, np.minimum(np.repeat(lengths, pieces) - offsets, seq_len + 1)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items, the longest first, each into the fullest row that it fits into: (item, row) int64[n] each, by length.

    Items of one length are placed together. Rows with the same room left are equals, so what is kept is a list of rows
    for each room, and a bit mask of the rooms that have any.
    """
    items = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows = 0, 0  # bit r of `rooms`: some row has room for r tokens
    row_of: list[int] = []
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            enough = rooms >> size
            room = size + (enough & -enough).bit_length() - 1 if enough else capacity
            each = room // size  # a row that took one is the fullest again, as long as it has room
            wanted = -(-count // each)
            if enough:
                taken = with_room[room][-wanted:]
                del with_room[room][-wanted:]
                rooms ^= 0 if with_room[room] else 1 << room
            else:
                taken = list(range(rows, rows + wanted))
                rows += wanted
            placed = min(count, each * len(taken))
            row_of += taken if each == 1 else [row for row in taken for _ in range(each)][:placed]
            count -= placed
            missing = each * len(taken) - placed  # items that the last row could still have taken
            if missing:
                room_of_last = room - (each - missing) * size
                with_room[room_of_last].append(taken.pop())
                rooms |= 1 << room_of_last
            left = room - each * size
            if left and taken:
                with_room[left] += taken
                rooms |= 1 << left
    return items, np.array(row_of, dtype=np.int64)


def _split_by_chunk(
    starts: np.ndarray, lengths: np.ndarray, row: np.ndarray, chunk_starts: np.ndarray, chunk_ends: np.ndarray
) -> np.ndarray:
    """Pieces by their place in the shard, in the order of their rows -> segments within chunks."""
    first = np.searchsorted(chunk_ends, starts, side="right")
    last = np.searchsorted(chunk_ends, starts + lengths - 1, side="right")
    parts = last - first + 1
    piece = np.repeat(np.arange(len(starts)), parts)
    chunk = np.arange(len(piece)) - np.repeat(np.cumsum(parts) - parts, parts) + first[piece]
    begin = np.maximum(starts[piece], chunk_starts[chunk])
    end = np.minimum((starts + lengths)[piece], chunk_ends[chunk])
    segments = np.zeros(len(piece), dtype=SEGMENT_DTYPE)
    segments["chunk"], segments["start"], segments["length"] = chunk, begin - chunk_starts[chunk], end - begin
    begins_piece = np.diff(piece, prepend=-1) != 0
    begins_row = np.diff(row[piece], prepend=-1) != 0
    segments["flags"] = BEGINS_PIECE * begins_piece + BEGINS_ROW * begins_row
    return segments[segments["length"] > 0]  # a chunk of others may be empty
