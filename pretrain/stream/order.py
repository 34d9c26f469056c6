"""The order of the samples of one source: a pure function from a sample number to (epoch, shard, window).

No input or output, no rank, no state. Every number of ranks, nodes and workers sees the same order, and a resume
needs nothing but the next sample number. Within an epoch:

1. the shards are permuted (where there are very many, groups of a few shards next to each other, `GROUPS` groups at
   most), and their windows form one line;
2. the line is cut into contiguous lanes, and sample i comes from lane i % lanes (so that a rank which takes every w-th
   sample reads few shards at a time): `LANES` of them, or as many as leave a whole block to each;
3. the windows of a lane are permuted inside blocks of `BLOCK` (so that a lane reads a bounded part of its line). A data
   set of fewer windows than two blocks is one lane and mixed throughout, or nearly.

Permutations sort a splitmix64 stream (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) and not
NumPy's generators, whose streams may change between versions.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

LANES = 32
BLOCK = 16_384  # windows of one lane that are permuted together
GROUPS = 1 << 18  # that an epoch permutes at most: what a start in the middle of an epoch has to do

_BITS = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_AT_ONCE = 1 << 15
_SHARDS, _WINDOWS = 1, 2  # what a key is for; keeps the streams of different uses apart


def splitmix64(key: int, count: int) -> np.ndarray:
    """The first `count` outputs of splitmix64 started at state `key`, uint64[count]."""
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def splitmix64_at(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Output number `places` (from 0 on) of splitmix64 started at state `keys`, both uint64, broadcast."""
    return _mixed((places + np.uint64(1)) * np.uint64(_GOLDEN) + keys)


def hash_keys(key: int, last: np.ndarray) -> np.ndarray:
    """uint64[k]: hash_key(*parts, number) of each of the numbers int64[k], where `key` is hash_key(*parts)."""
    return _mixed((last.astype(np.uint64) ^ np.uint64(key)) + np.uint64(_GOLDEN))


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's mixing function, in the memory of `x`."""
    other = x >> np.uint64(30)
    for factor, shift in ((_MIX_1, 27), (_MIX_2, 31)):
        x ^= other
        x *= np.uint64(factor)
        np.right_shift(x, np.uint64(shift), out=other)
    x ^= other
    return x


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
    """A permutation of range(count) that depends on `key` only, int64[count].

    It sorts the upper 32 bits of splitmix64, equal ones by number, in two stable passes over 16 bits: NumPy has a radix
    sort for those, several times as fast as a sort of 64 bits.
    """
    upper = np.empty(count, dtype=np.uint32)
    for start in range(0, count, _AT_ONCE):  # in parts that stay in the processor's cache
        part = upper[start : start + _AT_ONCE]
        part[:] = splitmix64((key + start * _GOLDEN) & _BITS, len(part)) >> np.uint64(32)
    by_lower = np.argsort(upper.astype(np.uint16), kind="stable")
    by_upper = np.argsort((upper >> np.uint32(16)).astype(np.uint16)[by_lower], kind="stable")
    return by_lower[by_upper]


@dataclass(frozen=True)
class Places:
    """Where k samples of a source come from; all int64[k]. `window` counts within the shard."""

    epoch: np.ndarray
    shard: np.ndarray
    window: np.ndarray


class Order:
    """The order of all samples of a data set, for ever: epoch e holds samples e * epoch_samples onwards.

    `windows_per_shard`: int64[shards], how many windows each shard holds. `shuffle=False` keeps the natural order.
    """

    def __init__(self, windows_per_shard: np.ndarray, seed: int, shuffle: bool = True):
        windows = np.asarray(windows_per_shard, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(windows)])  # the first window of each shard in natural order
        self.epoch_samples = int(self._starts[-1])
        self._group_starts = self._starts[: len(windows) : 1 + (len(windows) - 1) // GROUPS]
        self._lanes = max(1, min(LANES, self.epoch_samples // BLOCK))
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = Recent(2)  # epoch -> the order of its groups
        self._blocks = Recent(8)  # (epoch, block) -> the permutations of all lanes; 1 MiB each

    def locate(self, sample_numbers: np.ndarray) -> Places:
        """The places of global sample numbers int64[k] (>= 0, in any order, of any epochs)."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        assert self.epoch_samples > 0 and (numbers.size == 0 or numbers.min() >= 0)
        epoch, line = np.divmod(numbers, self.epoch_samples)
        shard, window = np.empty_like(line), np.empty_like(line)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            shard[here], window[here] = self._locate_in_epoch(e, line[here])
        return Places(epoch, shard, window)

    def _locate_in_epoch(self, epoch: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        natural = samples
        if self._shuffle:
            groups, starts = self._epochs.get(epoch, lambda: self._group_order(epoch))
            line = self._line_position(epoch, samples)
            # side="right" steps over what holds no window: it starts where the next one starts
            place = np.searchsorted(starts, line, side="right") - 1
            natural = self._group_starts[groups[place]] + line - starts[place]
        shard = np.searchsorted(self._starts, natural, side="right") - 1
        return shard, natural - self._starts[shard]

    def _group_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in the order of an epoch, and where each begins on the line."""
        groups = permutation(hash_key(self._seed, epoch, _SHARDS), len(self._group_starts))
        sizes = np.diff(self._group_starts, append=self.epoch_samples)[groups]
        return groups, np.cumsum(sizes) - sizes

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


class Recent:
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
