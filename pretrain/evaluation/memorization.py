"""Windows of training text by how often the training text has them, and which of them a model knows by heart.

Held-out windows that the training text does not have are the measure of what can be guessed.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import nn

from pretrain.inference.generate import generate_all
from pretrain.shards.documents import chunks
from pretrain.shards.manifest import Manifest
from pretrain.stream.order import hash_keys

PROMPT, CONTINUATION = 32, 32  # tokens
CANDIDATES = 20_000  # windows that are counted, to find often repeated ones
BUCKETS = {"once": (1, 1), "2 to 10 times": (2, 10), "11 times or more": (11, np.inf)}
HELD_OUT = "held out"
FILTER_BITS = 20
BATCH_SIZE = 32
BASE = 0x9E3779B97F4A7C15  # of the hash, and what undoes it modulo 2^64
INVERSE = pow(BASE, -1, 2**64)


def choose_windows(
    training: Sequence[Manifest], held_out: Manifest, special: Sequence[int], limit: int,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """At most `limit` windows of each bucket, and of held-out text: int64[n, PROMPT + CONTINUATION].

    No window holds a `special` id, so each is of one document. `on_tokens` is told of tokens read: `tokens_to_read`.
    """
    length = PROMPT + CONTINUATION
    seen = distinct(windows(training, length, CANDIDATES, special, on_tokens))
    unseen = distinct(windows([held_out], length, CANDIDATES, special, on_tokens))
    counts = count_windows(training, np.concatenate([seen, unseen]), on_tokens)
    chosen = {}
    for name, (low, high) in BUCKETS.items():
        chosen[name] = seen[(counts[: len(seen)] >= low) & (counts[: len(seen)] <= high)]
    chosen[HELD_OUT] = unseen[counts[len(seen) :] == 0]
    return {name: rows[_spread(len(rows), limit)] for name, rows in chosen.items()}


def memorized(model: nn.Module, rows: np.ndarray, on_rows: Callable[[int], object] = lambda count: None) -> np.ndarray:
    """Whether the greedy continuation of each row's first PROMPT ids is the rest of the row, bool[n].

    `rows`: ids [n, PROMPT + CONTINUATION] (Carlini et al., "Quantifying Memorization", 2022). A row ends at its first
    other id.
    """
    right = rows[:, PROMPT:].tolist()

    def is_over(row: int, ids: list[int]) -> bool:
        return ids[-1] != right[row][len(ids) - 1]

    prompts = rows[:, :PROMPT].tolist()
    found = generate_all(model, prompts, CONTINUATION, BATCH_SIZE, is_over=is_over, on_rows=on_rows)
    return np.array([ids == continuation for ids, continuation in zip(found, right, strict=True)], dtype=bool)


def tokens_to_read(training: Sequence[Manifest], held_out: Manifest) -> int:
    """What `choose_windows` reads: the training text twice."""
    return 2 * sum(manifest.tokens for manifest in training) + held_out.tokens


def windows(
    manifests: Sequence[Manifest], length: int, count: int, special: Sequence[int], on_tokens: Callable[[int], object]
) -> np.ndarray:
    """About `count` windows without special ids, spread evenly over the tokens: int64[n, length]."""
    step = max(1, sum(manifest.tokens for manifest in manifests) // count)
    found = [np.empty((0, length), dtype=np.int64)]
    for tokens in _chunks(manifests, on_tokens):
        if len(tokens) >= length:
            some = np.lib.stride_tricks.sliding_window_view(tokens, length)[::step]
            found.append(some[~np.isin(some, special).any(1)].astype(np.int64))
    return np.concatenate(found)


def distinct(rows: np.ndarray) -> np.ndarray:
    """Each window once, in the order of the first."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]


def count_windows(
    manifests: Sequence[Manifest], rows: np.ndarray, on_tokens: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """How often each row [n, length] occurs anywhere in the data sets, int64[n].

    By 64-bit hashes of all windows: two different ones share theirs about never.
    """
    length = rows.shape[1]
    wanted, which = np.unique(hashes(rows.ravel(), length)[::length], return_inverse=True)
    counts = np.zeros(len(wanted), dtype=np.int64)
    shift = np.uint64(64 - FILTER_BITS)
    possible = np.zeros(1 << FILTER_BITS, dtype=bool)  # most windows end here: a search costs more
    possible[wanted >> shift] = True
    for tokens in _chunks(manifests, on_tokens):
        found = hashes(tokens, length)
        found = found[possible[found >> shift]]
        places = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        counts += np.bincount(places[wanted[places] == found], minlength=len(wanted))
    return counts[which]


def hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of each window of `length` tokens, uint64[len(tokens) - length + 1]: sums of mixed ids times powers of an
    odd number, modulo 2^64.
    """
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    powers, inverses = (np.cumprod(np.full(len(tokens), base, dtype=np.uint64)) for base in (BASE, INVERSE))
    sums = np.append(np.uint64(0), np.cumsum(hash_keys(0, tokens) * powers))
    return (sums[length:] - sums[:-length]) * inverses[: len(sums) - length]


def _chunks(manifests: Sequence[Manifest], on_tokens: Callable[[int], object]) -> Iterator[np.ndarray]:
    for manifest in manifests:
        for tokens, _ in chunks(manifest):
            yield tokens
            on_tokens(len(tokens))


def _spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` places, spread evenly."""
    some = min(count, limit)
    return np.arange(some) * count // max(some, 1)
