"""Where the pieces of matrices lie over the ranks, and which rank puts which matrix together: pure, the same on all.

Muon's update needs matrices whole, and ZeRO cuts them: by stretches of one flat buffer (stages 1 and 2), or each into
equal parts (stage 3). Both are pieces of a line, so a few numbers say where all of a matrix is, on any number of ranks.
"""

from dataclasses import dataclass
from itertools import zip_longest

import torch

NEARLY = 0.9  # of the largest piece: who has so much of a matrix may put it together


@dataclass(frozen=True)
class Matrix:
    """A matrix of `shape`, of which `tensor`, that this rank steps, has this rank's piece from number `place` on.

    It begins at number `start` of a line, of which each rank in turn has `width` numbers. Width 0: each rank has all.
    """

    tensor: torch.Tensor
    shape: tuple[int, int]
    place: int = 0
    start: int = 0
    width: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def cost(self) -> int:
        """Proportional to the multiplications of an update."""
        return self.numel * min(self.shape)

    def size(self, rank: int) -> int:
        """The numbers of it that a rank has. The pieces follow one another as the ranks do."""
        if not self.width:
            return self.numel
        first, last = max(rank * self.width, self.start), min((rank + 1) * self.width, self.start + self.numel)
        return max(0, last - first)


Owned = tuple[Matrix | None, ...]  # by rank: the matrix that it puts together


@dataclass(frozen=True)
class Plan:
    """`alone`: what this rank has whole and nobody else any of. `rounds`: of the others, one or none a rank at a time.
    `is_everywhere`: each rank has all of them.
    """

    alone: list[Matrix]
    rounds: list[Owned]
    is_everywhere: bool


def plan_of(matrices: list[Matrix], rank: int, world_size: int) -> Plan:
    """A matrix goes to one of those that have most of it: the costliest first, each to who has least to do so far
    (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). One a rank at a time bounds the memory that they take.
    """
    alone: list[Matrix] = []
    queues: list[list[Matrix]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        sizes = [matrix.size(each) for each in range(world_size)]
        near = [each for each, size in enumerate(sizes) if size >= NEARLY * max(sizes)]
        owner = min(near, key=load.__getitem__)
        load[owner] += matrix.cost
        if sum(map(bool, sizes)) > 1:
            queues[owner].append(matrix)
        elif owner == rank:
            alone.append(matrix)
    return Plan(alone, list(zip_longest(*queues)), not all(matrix.width for matrix in matrices))
