"""Whole data sets from their first chunk to their last, for what has to see all tokens rather than windows of them."""

from collections.abc import Iterator

import numpy as np

from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import ShardReader


def chunks(manifest: Manifest) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each chunk, as stored, and where documents start in it: int64[n], without a 0 where its first
    tokens continue a document.
    """
    reader = ShardReader(manifest)
    try:
        for shard in range(len(manifest.shards)):
            for chunk, count in enumerate(manifest.chunks(shard)["tokens"].tolist()):
                tokens = np.empty(count, dtype=manifest.dtype)
                reader.read_segments([(shard, chunk, 0, 0, count)], tokens)
                yield tokens, reader.document_starts(shard, chunk)
    finally:
        reader.close()


def stretches(manifest: Manifest, length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each document cut into stretches of `length` tokens: (number of the document, tokens). What is left over at the
    end of a document or of a chunk is in none.
    """
    document = -1
    for tokens, starts in chunks(manifest):
        ends = np.append(starts, len(tokens))
        if len(starts) == 0 or starts[0]:
            yield from ((document, part) for part in _cut(tokens[: ends[0]], length))
        for start, end in zip(starts.tolist(), ends[1:].tolist(), strict=True):
            document += 1
            yield from ((document, part) for part in _cut(tokens[start:end], length))


def _cut(tokens: np.ndarray, length: int) -> np.ndarray:
    return tokens[: len(tokens) // length * length].reshape(-1, length)
