"""Several sources in one order, in phases: which sample of which source a global sample number is. Pure, like order.py.

The samples of a phase are cut into blocks of `BLOCK`. In each block a source has the same quota of places (by largest
remainder of its weight), permuted by a key of the block, and fills them with its own samples in its own order: a source
is read as it would be alone, epoch after epoch, whatever it is mixed with.

A phase begins at a step with a sequence length, a global batch size and weights. Where only the batch or the weights
change, every source goes on where it was. A new sequence length cuts other rows: each source begins a new epoch then.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.stream.order import Order, Places, Recent, hash_key, permutation

BLOCK = 4_096  # samples in which every source has its exact share
_MIX = 3  # keeps this use of the keys apart from those of order.py
EpochSamples = Callable[[int, int], int]  # (source, seq_len) -> rows of the source in an epoch


@dataclass(frozen=True)
class Phase:
    """What holds from `from_step` on: sequence length in tokens, samples of a global batch, a weight for each source.

    `from_sample` and, for each source, the number of its next sample (`starts`) are filled in by `open_phases`.
    """

    from_step: int
    seq_len: int
    global_batch_size: int
    weights: tuple[float, ...]
    from_sample: int = 0
    starts: tuple[int, ...] = ()

    def settings(self) -> tuple:
        """What makes one phase another than the one before it."""
        return self.seq_len, self.global_batch_size, self.weights


def quotas(weights: Sequence[float]) -> np.ndarray:
    """The places of each source in a block, int64[sources], by largest remainder; ties go to the earlier source."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    places = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - places), kind="stable")
    places[by_remainder[: BLOCK - int(places.sum())]] += 1
    return places


def open_phases(
    planned: Sequence[Phase], recorded: Sequence[Phase], step: int, seed: int, epoch_samples: EpochSamples
) -> tuple[Phase, ...]:
    """All phases of a run that stands before `step`: the past as recorded, the future as planned.

    `planned` is in order and begins at step 0. A plan that says something else of now than the last recorded phase
    opens a new one at `step`.
    """
    assert planned[0].from_step == 0
    phases = [phase for phase in recorded if phase.from_step < step]
    now = [phase for phase in planned if phase.from_step <= step][-1]
    if not phases or phases[-1].settings() != now.settings():
        phases.append(_opened(phases, replace(now, from_step=step), seed, epoch_samples))
    for phase in planned:
        if phase.from_step > step:
            phases.append(_opened(phases, phase, seed, epoch_samples))
    return tuple(phases)


def _opened(before: list[Phase], phase: Phase, seed: int, epoch_samples: EpochSamples) -> Phase:
    if not before:
        return replace(phase, from_sample=0, starts=(0,) * len(phase.weights))
    last = before[-1]
    samples = (phase.from_step - last.from_step) * last.global_batch_size
    starts = consumed(last, samples, seed)
    if phase.seq_len != last.seq_len:
        sizes = [max(epoch_samples(source, last.seq_len), 1) for source in range(len(starts))]  # 0: it had no weight
        epochs = [-(-count // size) for count, size in zip(starts, sizes, strict=True)]
        starts = tuple(e * epoch_samples(source, phase.seq_len) for source, e in enumerate(epochs))
    return replace(phase, from_sample=last.from_sample + samples, starts=starts)


def consumed(phase: Phase, samples: int, seed: int) -> tuple[int, ...]:
    """The number of each source's next sample after the first `samples` samples of a phase."""
    blocks, rest = divmod(samples, BLOCK)
    share = quotas(phase.weights)
    in_block = np.bincount(_block(phase, blocks, seed)[0][:rest], minlength=len(share))
    return tuple((np.asarray(phase.starts) + blocks * share + in_block).tolist())


class Mixture:
    """The order of all samples of a run. `order_of(source, seq_len)` gives the order of one source alone."""

    def __init__(self, phases: Sequence[Phase], seed: int, order_of: Callable[[int, int], Order]):
        self.phases = tuple(phases)
        self._seed = seed
        self._order_of = order_of
        self._blocks = Recent(4)

    def phase_of_step(self, step: int) -> Phase:
        """The phase that global batch number `step` belongs to."""
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.from_step) - 1]

    def phase_of_sample(self, number: int) -> Phase:
        """The phase of a global sample number."""
        return self.phases[bisect_right(self.phases, number, key=lambda phase: phase.from_sample) - 1]

    def locate(self, numbers: np.ndarray, phase: Phase) -> tuple[np.ndarray, Places]:
        """Global sample numbers int64[k] of a phase -> source int64[k], and the place of each within its source."""
        offset = np.asarray(numbers, dtype=np.int64) - phase.from_sample
        assert offset.size == 0 or offset.min() >= 0
        if len(phase.weights) == 1:
            return np.zeros_like(offset), self._order_of(0, phase.seq_len).locate(phase.starts[0] + offset)
        source, own = self._mixed(offset, phase)
        places = Places(*(np.empty_like(offset) for _ in range(3)))
        for s in np.unique(source).tolist():
            here = source == s
            found = self._order_of(s, phase.seq_len).locate(own[here])
            places.epoch[here], places.shard[here], places.window[here] = found.epoch, found.shard, found.window
        return source, places

    def _mixed(self, offset: np.ndarray, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        """Samples of a phase -> the source of each, and the number of the sample within the source."""
        block, place = np.divmod(offset, BLOCK)
        source, rank = np.empty_like(offset), np.empty_like(offset)
        for b in np.unique(block).tolist():
            here = block == b
            sources, ranks = self._blocks.get((phase, b), lambda b=b: _block(phase, b, self._seed))
            source[here], rank[here] = sources[place[here]], ranks[place[here]]
        return source, np.asarray(phase.starts)[source] + block * quotas(phase.weights)[source] + rank


def _block(phase: Phase, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each place of a block: its source, and how many places of the same source come before it; int64[BLOCK]."""
    share = quotas(phase.weights)
    key = hash_key(seed, _MIX, phase.from_sample, block)
    source = np.repeat(np.arange(len(share)), share)[permutation(key, BLOCK)]
    rank = np.empty(BLOCK, dtype=np.int64)
    for s, count in enumerate(share.tolist()):
        rank[source == s] = np.arange(count)
    return source, rank
