"""Several sources in one order, in phases: which sample of which source a global sample number is. Pure, like order.py.

The samples of a phase are cut into blocks of `BLOCK`. In each block a source has the same quota of places (by largest
remainder of its weight), permuted by a key of the block, and fills them with its own samples in its own order: a source
is read as it would be alone, epoch after epoch, whatever it is mixed with.

A phase begins at a step with a sequence length, a global batch size and weights. Where only the batch or the weights
change, every source goes on where it was. So it does where the length changes and both lengths are pieces of the same
wholes (pieces.py), but for what is left of a block when the change was not planned. Another new length cuts other rows:
each source begins a new epoch then, and what it has not read of the one before is left behind.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pretrain.stream.order import Order, Places, Recent, hash_key, permutation
from pretrain.stream.pieces import BlockOrders, Stretch

BLOCK = 4_096  # samples in which every source has its exact share
_MIX = 3  # keeps this use of the keys apart from those of order.py


class Cut(NamedTuple):
    """How rows are made: of `seq_len` tokens each, pieces of windows of `whole_len` tokens."""

    seq_len: int
    whole_len: int

    @property
    def ratio(self) -> int:
        return self.whole_len // self.seq_len


EpochSamples = Callable[[int, Cut], int]  # (source, cut) -> rows of the source in an epoch


@dataclass(frozen=True)
class Phase:
    """What holds from `from_step` on: sequence length in tokens, samples of a global batch, a weight for each source.

    `whole_len`: the windows that its rows are pieces of; 0, of packed documents and in version 1: the rows themselves.
    `open_phases` fills in `from_sample` and, for each source, the numbers of its next sample (`starts`), of the first
    of this length (`origins`) and of the first after the planned end of this length (`ends`; empty: none is planned);
    and how many rows of the length before are left behind (`left`; empty: less than a whole).
    """

    from_step: int
    seq_len: int
    global_batch_size: int
    weights: tuple[float, ...]
    whole_len: int = 0
    from_sample: int = 0
    starts: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    left: tuple[int, ...] = ()

    @cached_property
    def cut(self) -> Cut:
        return Cut(self.seq_len, self.whole_len or self.seq_len)

    def stretch(self, source: int, epoch_samples: int) -> Stretch:
        """The rows of this length of a source that has so many in an epoch."""
        origin, ratio = self.origins[source] if self.origins else 0, self.cut.ratio
        return Stretch(ratio, max(1, epoch_samples // ratio), origin, self.ends[source] if self.ends else None)

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
    opens a new one at `step`; so does a phase that is planned for this step, whatever it changes.
    """
    assert planned[0].from_step == 0
    phases = [phase for phase in recorded if phase.from_step < step]
    past = len(phases)
    now = [phase for phase in planned if phase.from_step <= step][-1]
    if not phases or now.from_step == step or phases[-1].settings() != now.settings():
        phases.append(_opened(phases, replace(now, from_step=step), seed, epoch_samples))
    for phase in planned:
        if phase.from_step > step:
            if _kept(phase, phases[-1]).cut != phases[-1].cut:
                _plan_end(phases, past, phase.from_step, seed)
            phases.append(_opened(phases, phase, seed, epoch_samples))
    return tuple(phases)


def _next_samples(last: Phase, step: int, seed: int) -> tuple[int, ...]:
    """The number of each source's next sample before `step`, where `last` is the phase until then."""
    return consumed(last, (step - last.from_step) * last.global_batch_size, seed)


def _plan_end(phases: list[Phase], past: int, step: int, seed: int) -> None:
    """Write into the latest phases of one length that `step` ends it; not into what was begun with another plan."""
    first = len(phases)
    while first and phases[first - 1].cut == phases[-1].cut:
        first -= 1
    if first >= past:
        ends = _next_samples(phases[-1], step, seed)
        phases[first:] = [replace(phase, ends=ends) for phase in phases[first:]]


def _kept(phase: Phase, last: Phase) -> Phase:
    """The phase with the wholes of the one before it where its rows can be pieces of them, whatever else is planned."""
    if phase.whole_len and last.cut.whole_len % phase.seq_len == 0:
        return replace(phase, whole_len=last.cut.whole_len)
    return phase


def _opened(before: list[Phase], phase: Phase, seed: int, epoch_samples: EpochSamples) -> Phase:
    nothing = (0,) * len(phase.weights)
    if not before:
        return replace(phase, from_sample=0, starts=nothing, origins=nothing)
    last = before[-1]
    phase = _kept(phase, last)
    starts = _next_samples(last, phase.from_step, seed)
    samples = last.from_sample + (phase.from_step - last.from_step) * last.global_batch_size
    if phase.cut == last.cut:
        return replace(phase, from_sample=samples, starts=starts, origins=last.origins, ends=last.ends)
    sizes = [epoch_samples(source, last.cut) for source in range(len(starts))]
    if phase.cut.whole_len == last.cut.whole_len:
        stretches = [last.stretch(source, size) for source, size in enumerate(sizes)]
        wholes = [stretch.used_before(start) for stretch, start in zip(stretches, starts, strict=True)]
        ends = [whole * last.cut.ratio for whole in wholes]
        begins = tuple(whole * phase.cut.ratio for whole in wholes)
    else:
        epochs = [-(-count // max(size, 1)) for count, size in zip(starts, sizes, strict=True)]  # 0: it had no weight
        ends = [epoch * size for epoch, size in zip(epochs, sizes, strict=True)]
        begins = tuple(epoch * epoch_samples(source, phase.cut) for source, epoch in enumerate(epochs))
    left = tuple(end - start for end, start in zip(ends, starts, strict=True))
    left = left if max(left) >= last.cut.ratio else ()
    return replace(phase, from_sample=samples, starts=begins, origins=begins, left=left)


def consumed(phase: Phase, samples: int, seed: int) -> tuple[int, ...]:
    """The number of each source's next sample after the first `samples` samples of a phase."""
    blocks, rest = divmod(samples, BLOCK)
    share = quotas(phase.weights)
    in_block = np.bincount(_block(phase, blocks, seed)[0][:rest], minlength=len(share))
    return tuple((np.asarray(phase.starts) + blocks * share + in_block).tolist())


class Mixture:
    """The order of all samples of a run. `order_of(source, length)` gives that of the windows of one source alone."""

    def __init__(self, phases: Sequence[Phase], seed: int, order_of: Callable[[int, int], Order]):
        self.phases = tuple(phases)
        self._seed = seed
        self._order_of = order_of
        self._blocks, self._pieces = Recent(4), BlockOrders(seed)

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
            return np.zeros_like(offset), self._locate_own(0, phase.starts[0] + offset, phase)
        source, own = self._mixed(offset, phase)
        places = Places(*(np.empty_like(offset) for _ in range(3)))
        for s in np.unique(source).tolist():
            here = source == s
            found = self._locate_own(s, own[here], phase)
            places.epoch[here], places.shard[here], places.window[here] = found.epoch, found.shard, found.window
        return source, places

    def _locate_own(self, source: int, numbers: np.ndarray, phase: Phase) -> Places:
        """The places of a source's own samples; `window` counts rows of the phase's length within the shard."""
        order, ratio = self._order_of(source, phase.cut.whole_len), phase.cut.ratio
        if ratio == 1:
            return order.locate(numbers)
        whole, piece = phase.stretch(source, order.epoch_samples * ratio).locate(numbers, self._pieces)
        found = order.locate(whole)
        return replace(found, window=found.window * ratio + piece)

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
