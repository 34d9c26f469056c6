"""Windows cut into shorter ones: which piece of which window a row is. Pure, like order.py.

A run that plans several sequence lengths reads one epoch of windows of the longest, its wholes; a phase of shorter rows
reads pieces of them. Its rows are all pieces of the next wholes, permuted among themselves in blocks of one epoch that
have `BLOCK` pieces, or somewhat more: so pieces of a whole lie far apart, and what a phase leaves for the next one is
whole again. Where the end of a phase is planned, its blocks hold only as many wholes as it takes.
"""

from dataclasses import dataclass

import numpy as np

from pretrain.stream.order import BLOCK, Recent, hash_key, permutation

_PIECES = 5  # keeps this use of the keys apart from those of order.py, mixture.py and source.py


@dataclass(frozen=True)
class Stretch:
    """A source's rows from number `origin` on, each a `ratio`-th of a whole, planned to end before number `end` (None:
    open). Rows count from the first epoch on: whole w is the rows from w * ratio on, and `origin` is such a number.
    """

    ratio: int
    epoch_wholes: int
    origin: int
    end: int | None = None

    def used_before(self, row: int) -> int:
        """The number of the first whole that no row before this one has touched."""
        if self.ratio == 1 or row == self.origin:
            return row // self.ratio
        part, row = self._part(row - 1)
        return part.block(row // self.ratio)[1]

    def locate(self, rows: np.ndarray, orders: "BlockOrders") -> tuple[np.ndarray, np.ndarray]:
        """Rows int64[k] of the stretch -> the whole of each, and which piece of that; both int64[k]."""
        if self.ratio == 1:
            return rows, np.zeros_like(rows)
        found = np.empty_like(rows)
        if self.end is not None and (later := rows >= self.end).any():
            part, first = self._part(self.end)
            found[later] = part._locate(rows[later] - self.end + first, orders)
            found[~later] = self._locate(rows[~later], orders)
        else:
            found = self._locate(rows, orders)
        return found // self.ratio, found % self.ratio

    def block(self, whole: int) -> tuple[int, int]:
        """The first whole of the block that a whole is in, and the one after its last."""
        epoch = whole // self.epoch_wholes
        begin, end = max(self.origin // self.ratio, epoch * self.epoch_wholes), (epoch + 1) * self.epoch_wholes
        wholes = (end if self.end is None else min(end, self._planned)) - begin
        blocks = max(1, wholes * self.ratio // BLOCK)  # of nearly the same size: a small last one would mix nothing
        number = ((whole - begin + 1) * blocks - 1) // wholes
        return begin + number * wholes // blocks, begin + (number + 1) * wholes // blocks

    @property
    def _planned(self) -> int:
        """The whole after those that the stretch takes to its planned end."""
        return -(-self.end // self.ratio)

    def _part(self, row: int) -> tuple["Stretch", int]:
        """The stretch that a row is of, and its number there: what comes after the planned end is one of its own."""
        if self.end is None or row < self.end:
            return self, row
        origin = self._planned * self.ratio
        return Stretch(self.ratio, self.epoch_wholes, origin), row - self.end + origin

    def _locate(self, rows: np.ndarray, orders: "BlockOrders") -> np.ndarray:
        """Rows of the stretch -> the numbers of the pieces, int64[k]: piece p of whole w is w * ratio + p."""
        found, wholes = np.empty_like(rows), rows // self.ratio
        left = np.ones(len(rows), dtype=bool)
        while left.any():
            start, stop = self.block(int(wholes[left.argmax()]))
            here = (start <= wholes) & (wholes < stop)
            first = start * self.ratio
            found[here] = first + orders.of(self.ratio, start, stop)[rows[here] - first]
            left &= ~here
        return found


class BlockOrders:
    """The orders of the pieces of blocks, the latest ones kept."""

    def __init__(self, seed: int):
        self._seed, self._kept = seed, Recent(8)

    def of(self, ratio: int, start: int, stop: int) -> np.ndarray:
        """The order of the pieces of the wholes from `start` to before `stop`, int64[(stop - start) * ratio]."""
        key = hash_key(self._seed, _PIECES, ratio, start)
        return self._kept.get((ratio, start, stop), lambda: permutation(key, (stop - start) * ratio))
