"""One data set as a stream reads it: its rows at each sequence length, their order, and what to do about damage."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import BadChunk, ShardReader
from pretrain.stream.mixture import Cut
from pretrain.stream.order import Order, Recent, hash_key
from pretrain.stream.packing import PACKINGS, BestFit, Windows

REPLACEMENTS = 64  # rows of one shard tried in the place of a damaged one
_REPLACE = 4  # keeps this use of the keys apart from those of order.py and mixture.py


@dataclass(frozen=True)
class StreamOptions:
    """How rows are made and read. `prefetch_batches`: how many are read at once, one such lot ahead of the consumer.

    `documents`: number the documents of each row. `quarantine`: replace what is damaged instead of stopping.
    `cache_folder`: for the plan of best_fit.
    """

    shuffle: bool = True
    packing: str = "window"
    documents: bool = False
    quarantine: bool = False
    prefetch_batches: int = 8
    cache_folder: Path | None = None


class Source:
    """A data set, opened. `bad` is the (shard, chunk) pairs found damaged, which are read no more."""

    def __init__(self, manifest: Manifest, seed: int, options: StreamOptions):
        self.manifest, self._seed, self._options = manifest, seed, options
        self._reader = ShardReader(manifest)
        self._layouts, self._orders = Recent(4), Recent(2)  # of a phase and the one before it, and of their wholes

    @property
    def bad(self) -> set[tuple[int, int]]:
        return self._reader.bad

    def layout(self, cut: Cut) -> Windows | BestFit:
        """How the shards are cut into rows."""

        def make() -> Windows | BestFit:
            options = (cut.seq_len, self._options.documents, self._options.cache_folder)
            pieces = {"whole_len": cut.whole_len} if cut.ratio > 1 else {}  # only windows have them
            return PACKINGS[self._options.packing](self._reader, *options, **pieces)

        return self._layouts.get(cut, make)

    def order(self, whole_len: int) -> Order:
        """The order of the wholes, the same whatever the source is mixed with."""
        rows_per_shard = self.layout(Cut(whole_len, whole_len)).rows_per_shard
        return self._orders.get(whole_len, lambda: Order(rows_per_shard, self._seed, self._options.shuffle))

    def epoch_samples(self, cut: Cut) -> int:
        """The rows of an epoch."""
        return self.order(cut.whole_len).epoch_samples * cut.ratio

    def read(self, cut: Cut, shard: np.ndarray, row: np.ndarray) -> tuple:
        """Rows int64[k] of shards int64[k], as the layout reads them; a damaged one is replaced under quarantine."""
        layout = self.layout(cut)
        try:
            return layout.read(shard, row)
        except BadChunk:
            if not self._options.quarantine:
                raise
        each = [self._read_or_replace(layout, *place) for place in zip(shard.tolist(), row.tolist(), strict=True)]
        return tuple(None if column[0] is None else np.concatenate(column) for column in zip(*each, strict=True))

    def fetch(self, shards: Iterable[int]) -> None:
        """Have remote shards fetched in the background."""
        for entry in (self.manifest.shards[shard] for shard in shards):
            self.manifest.store.prefetch(entry.name, entry.bytes, entry.sha256)

    def check_enough(self, cut: Cut, needed: int) -> None:
        """`ValueError` with what would do, unless there are the `needed` samples that one batch takes."""
        samples, seq_len = self.epoch_samples(cut), cut.seq_len
        if samples >= needed:
            return
        shorter = seq_len
        while shorter > 1 and int(self.manifest.windows_per_shard(shorter).sum()) < needed:
            shorter //= 2
        fits = int(self.manifest.windows_per_shard(shorter).sum()) >= needed
        remedies = [f"a global batch with at most {samples} of them"] if samples else []
        if cut.ratio > 1:  # the rows are pieces of the windows of the longest length
            remedies += [f"no phase of {cut.whole_len} tokens, of whose windows these are pieces"]
        elif fits:
            remedies += [f"a sequence length of at most {shorter}"]
        raise ValueError(
            f"{self.manifest.location} holds {samples} samples of {seq_len} tokens, fewer than the {needed} of one "
            f"batch ({self.manifest.tokens:,} tokens in all): use {' or '.join(remedies + ['more text'])}"
        )

    def _read_or_replace(self, layout: Windows | BestFit, shard: int, row: int) -> tuple:
        """A row, or where it lies in a damaged chunk another one in its place: a function of (shard, row) and of what
        is damaged, first of the same shard, then of the next ones. The order of all else stays as it is.
        """
        counts = layout.rows_per_shard.tolist()
        key = (self._seed, _REPLACE, shard, row)
        others = [s for s in [*range(shard, len(counts)), *range(shard)] if counts[s]]
        try:
            return layout.read(np.array([shard]), np.array([row]))
        except BadChunk as error:
            problem = error
        for attempt in range(REPLACEMENTS * len(others)):
            shard = others[attempt // REPLACEMENTS]
            try:
                return layout.read(np.array([shard]), np.array([hash_key(*key, attempt) % counts[shard]]))
            except BadChunk as error:
                problem = error
        raise problem
