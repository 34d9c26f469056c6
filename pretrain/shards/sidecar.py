"""The sidecar of a shard: a table that says where each chunk lies in the tar, and what its bytes must be.

Its hash, in index.json, shows damage. `problems` shows a table made up: positions outside the bytes that the crc32s
watch, or counts other than those that the order of samples was made from.
"""

import io
from functools import lru_cache

import numpy as np

# A chunk is `bytes` bytes of the shard from `offset` on, headers and padding included: the chunks of a shard lie end to
# end and cover it up to the end of the archive, so `crc32` (of those bytes) leaves no byte unwatched. `tokens_offset`
# and `docs_offset` are bytes from the start of the shard to the first number (after the .npy header), `tokens` and
# `docs` count numbers.
CHUNK_DTYPE = np.dtype(
    [("offset", "<i8"), ("bytes", "<i8"), ("crc32", "<u4"), ("flags", "<u4"),
     ("tokens_offset", "<i8"), ("tokens", "<i8"), ("docs_offset", "<i8"), ("docs", "<i8")]
)  # fmt: skip
CONTINUES = 1  # flag: the first tokens continue the document of the chunk before
WHOLE = 2  # flag: no list of documents (stock webdataset wrote it), the chunk is one; `docs` is 0 and counts as 1


def sidecar_name(shard_name: str) -> str:
    """The file name of a shard's sidecar: 00000000.tar -> 00000000.idx.npy."""
    return shard_name.removesuffix(".tar") + ".idx.npy"


def to_bytes(chunks: np.ndarray) -> bytes:
    """The content of the sidecar of CHUNK_DTYPE[chunks], a .npy file; the same table gives the same bytes."""
    assert chunks.dtype == CHUNK_DTYPE and chunks.ndim == 1
    return _header(len(chunks)) + chunks.tobytes()


def from_bytes(data: bytes) -> np.ndarray:
    """The table in a sidecar; `ValueError` when it is none.

    NumPy's reader of headers is not safe in several threads at once (it goes through Python's parser), and a sidecar
    has one right header.
    """
    size = 10 + int.from_bytes(data[8:10], "little")
    count, rest = divmod(len(data) - size, CHUNK_DTYPE.itemsize)
    if count < 1 or rest or data[:size] != _header(count):
        raise ValueError(f"it does not hold rows of {CHUNK_DTYPE}")
    return np.frombuffer(data, CHUNK_DTYPE, count, size).copy()


@lru_cache(maxsize=16)
def _header(count: int) -> bytes:
    header = io.BytesIO()
    empty = np.lib.format.header_data_from_array_1_0(np.zeros(0, CHUNK_DTYPE))
    np.lib.format.write_array_header_1_0(header, empty | {"shape": (count,)})
    return header.getvalue()


def docs_of(chunks: np.ndarray) -> int:
    """How many documents start in chunks."""
    return int(chunks["docs"].sum() + (chunks["flags"] == WHOLE).sum())


def problems(
    chunks: np.ndarray, shard_bytes: int, tokens: int, docs: int, itemsize: int, full_chunk_tokens: int | None
) -> list[str]:
    """What in a table cannot be true of a shard with so many bytes, tokens (of `itemsize` bytes) and documents.

    `full_chunk_tokens`: what every chunk but the last holds; None where any number may be.
    """
    places = [chunks[name] for name in CHUNK_DTYPE.names if CHUNK_DTYPE[name] == "<i8"]
    outside = np.logical_or.reduce([(place < 0) | (place > shard_bytes) for place in places])
    if outside.any():  # what follows adds them up
        return [f"chunk {i:08d}: a position or a count is outside the shard" for i in np.flatnonzero(outside)]
    begin, flags = chunks["offset"], chunks["flags"]
    end = begin + chunks["bytes"]
    tokens_end = chunks["tokens_offset"] + chunks["tokens"] * itemsize
    docs_end = chunks["docs_offset"] + chunks["docs"] * 4
    faults = {
        "its bytes do not begin where those of the chunk before end": begin != np.append(0, end[:-1]),
        "its tokens lie outside its bytes": (chunks["tokens"] == 0) | (chunks["tokens_offset"] < begin)
        | (tokens_end > end),
        "its document starts lie outside its bytes": (chunks["docs_offset"] < begin) | (docs_end > end),
        "its flags do not go together": (flags > WHOLE) | ((flags == WHOLE) & (chunks["docs"] > 0)),
    }  # fmt: skip
    if full_chunk_tokens is not None:
        over, short = chunks["tokens"] > full_chunk_tokens, chunks["tokens"] < full_chunk_tokens
        faults[f"it does not hold {full_chunk_tokens:,} tokens"] = over | np.append(short[:-1], False)
    found = [f"chunk {i:08d}: {text}" for text, rows in faults.items() for i in np.flatnonzero(rows)]
    sums = {"bytes": (int(end[-1]), shard_bytes), "tokens": (int(chunks["tokens"].sum()), tokens),
            "documents": (docs_of(chunks), docs)}  # fmt: skip
    return found + [f"its chunks hold {is_:,} {name}, expected {should:,}"
                    for name, (is_, should) in sums.items() if is_ != should]  # fmt: skip
