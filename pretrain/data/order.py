"""The order of the samples: a pure function from a global sample number to (source, epoch, shard, window).

No input or output, no rank, no state. Every number of ranks, nodes and workers sees the same order, and a resume
needs nothing but the next sample number. Within an epoch:

1. the shards are permuted, and the windows of the permuted shards form one line;
2. the line is cut into contiguous lanes, and sample i comes from lane i % lanes (so that a rank which takes every w-th
   sample reads few shards at a time): `LANES` of them, or as many as leave a whole block to each;
3. the windows of a lane are permuted inside blocks of `BLOCK` (so that a lane reads a bounded part of its line). A data
   set of fewer windows than two blocks is one lane and mixed throughout, or nearly.

Permutations are argsorts of a splitmix64 stream (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
2014) and not NumPy's generators, whose streams may change between versions. The hashes of one stream are all different
(splitmix64 is a bijection of its counter), so an argsort of them has one answer, whatever the algorithm.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 32
BLOCK = 16_384  # windows of one lane that are permuted together

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SHARDS, _WINDOWS = 1, 2  # what a key is for; keeps the streams of different uses apart


def splitmix64(key: int, count: int) -> np.ndarray:
    """The first `count` outputs of splitmix64 started at state `key`, uint64[count], all different."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """One 64-bit key out of several integers (any size and sign), chained through splitmix64's mixing function."""
    key = 0
    for part in parts:
        x = ((key ^ (part & _BITS)) + _GOLDEN) & _BITS
        x = ((x ^ (x >> 30)) * _MIX_1) & _BITS
        x = ((x ^ (x >> 27)) * _MIX_2) & _BITS
        key = x ^ (x >> 31)
    return key


def permutation(key: int, count: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` only, int64[count]."""
    return np.argsort(splitmix64(key, count))


@dataclass(frozen=True)
class Places:
    """Where k samples come from; all int64[k]. `window` counts within the shard; `source` is 0 (one source)."""

    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    window: np.ndarray


class Order:
    """The order of all samples of a data set, for ever: epoch e holds samples e * epoch_samples onwards.

    `windows_per_shard`: int64[shards], how many windows each shard holds. `shuffle=False` keeps the natural order.
    """

    def __init__(self, windows_per_shard: np.ndarray, seed: int, shuffle: bool = True):
        self._windows = np.asarray(windows_per_shard, dtype=np.int64)
        self.epoch_samples = int(self._windows.sum())
        self._lanes = max(1, min(LANES, self.epoch_samples // BLOCK))
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = _Recent(2)  # epoch -> its shard order
        self._blocks = _Recent(8)  # (epoch, block) -> the permutations of all lanes; 1 MiB each

    def locate(self, sample_numbers: np.ndarray) -> Places:
        """The places of global sample numbers int64[k] (>= 0, in any order, of any epochs)."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        assert self.epoch_samples > 0 and (numbers.size == 0 or numbers.min() >= 0)
        epoch, line = np.divmod(numbers, self.epoch_samples)
        shard, window = np.empty_like(line), np.empty_like(line)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            shard[here], window[here] = self._locate_in_epoch(e, line[here])
        return Places(np.zeros_like(line), epoch, shard, window)

    def _locate_in_epoch(self, epoch: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, starts = self._epochs.get(epoch, lambda: self._shard_order(epoch))
        line = self._line_position(epoch, samples) if self._shuffle else samples
        # side="right" steps over shards without a window: they start where the next one starts
        place = np.searchsorted(starts, line, side="right") - 1
        return shards[place], line - starts[place]

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._windows)
        shards = permutation(hash_key(self._seed, epoch, _SHARDS), count) if self._shuffle else np.arange(count)
        starts = np.zeros(count, dtype=np.int64)
        np.cumsum(self._windows[shards[:-1]], out=starts[1:])
        return shards, starts

    def _lane_length(self, lane: np.ndarray) -> np.ndarray:
        return self.epoch_samples // self._lanes + (lane < self.epoch_samples % self._lanes)

    def _line_position(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        place, lane = np.divmod(samples, self._lanes)
        block, offset = np.divmod(place, BLOCK)
        for b in np.unique(block).tolist():
            here = block == b
            table = self._blocks.get((epoch, b), lambda b=b: self._block_permutations(epoch, b))
            offset[here] = table[lane[here], offset[here]]
        short, longer = divmod(self.epoch_samples, self._lanes)
        return lane * short + np.minimum(lane, longer) + block * BLOCK + offset

    def _block_permutations(self, epoch: int, block: int) -> np.ndarray:
        """Of every lane, the permutation of its block number `block`: uint16[lanes, BLOCK] (the last one is short)."""
        table = np.zeros((self._lanes, BLOCK), dtype=np.uint16)
        lengths = np.clip(self._lane_length(np.arange(self._lanes)) - block * BLOCK, 0, BLOCK)
        for lane, length in enumerate(lengths.tolist()):
            table[lane, :length] = permutation(hash_key(self._seed, epoch, _WINDOWS, lane, block), length)
        return table


class _Recent:
    """A small cache that forgets what was used longest ago."""

    def __init__(self, size: int):
        self._size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = make()
        self._kept[key] = value
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return value
