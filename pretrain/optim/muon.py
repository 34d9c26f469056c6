"""Muon for matrices, AdamW for the rest, exact under ZeRO: what becomes of a weight does not depend on how it is cut.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled as Liu et al., "Muon is Scalable
for LLM Training", 2025, so that AdamW's learning rate and decay fit.

Momentum is elementwise: each rank keeps that of its pieces. For the update alone matrices are put together, each at one
rank, and the pieces of the update go where those of the weight are (`matrices` plans it).
"""

import math

import torch
import torch.distributed as torch_dist

from pretrain.optim.matrices import Matrix, Owned, Plan, plan_of

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's polynomial a x + b x^3 + c x^5, steep at 0: small values grow fast
ITERATIONS = 5
LEAST_NORM = 1e-7
RMS = 0.2  # of an update of AdamW, about; that of an orthogonal matrix is 1 / sqrt(its longer side)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T (its singular values come to lie around 1), in the precision of the matrix."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix  # or the products x x^T would be the larger ones
    x = x / x.norm().clamp(min=LEAST_NORM)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.mT if is_tall else x


class Orthogonalizer(torch.optim.AdamW):
    """AdamW, and Muon in the groups whose `algorithm` is that. (DeepSpeed would switch on a Muon of its own by the name
    of the class.)
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, momentum: float):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._momentum = momentum
        self.arrange([], 0, 1)

    def arrange(
        self, matrices: list[Matrix], rank: int, world_size: int, process_group: torch_dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Say where the pieces of matrices lie, in the same order on all ranks of a process group, and the precision
        that updates are computed in, and travel in. Before that each tensor is taken as a matrix, and whole.
        """
        self._rank, self._world_size, self._process_group, self._dtype = rank, world_size, process_group, dtype
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._matrices: dict[int, list[Matrix]] = {}
        for matrix in matrices:
            self._matrices.setdefault(id(matrix.tensor), []).append(matrix)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of the groups that have parameters now: ZeRO calls it for one of them, or a part of one, at a
        time. The gradients of matrices are written over.
        """
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["algorithm"] == "adamw"]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["algorithm"] == "muon" and group["params"]:
                self._step_matrices(group["params"], group["lr"], group["weight_decay"])

    def _step_matrices(self, tensors: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        for tensor in tensors:
            state = self.state[tensor]
            if not state:  # where a layout has not made it
                state.update(step=torch.zeros((), device=tensor.device), momentum=torch.zeros_like(tensor))
            state["step"] += 1
            state["momentum"].lerp_(tensor.grad, 1 - self._momentum)
            tensor.grad.lerp_(state["momentum"], self._momentum)  # Nesterov's
            tensor.mul_(1 - lr * weight_decay)
        plan = self._plan(tensors)
        for matrix in plan.alone:
            self._add(matrix, self._update(matrix, self._piece(matrix)), lr)
        for owned in plan.rounds:
            (self._broadcast if plan.is_everywhere else self._exchange)(owned, lr)

    def _plan(self, tensors: list[torch.Tensor]) -> Plan:
        key = tuple(map(id, tensors))
        if key not in self._plans:
            listed = [self._matrices.get(id(tensor), [Matrix(tensor, tuple(tensor.shape))]) for tensor in tensors]
            self._plans[key] = plan_of(sum(listed, []), self._rank, self._world_size)
        return self._plans[key]

    def _exchange(self, owned: Owned, lr: float) -> None:
        """Each rank gets all pieces of the matrix that it owns, and gives everyone those of its update."""
        mine = owned[self._rank]
        sizes = [matrix.size(self._rank) if matrix else 0 for matrix in owned]
        sizes_of_mine = [mine.size(rank) if mine else 0 for rank in range(self._world_size)]
        whole = self._swapped(torch.cat([self._piece(matrix) for matrix in owned if matrix]), sizes, sizes_of_mine)
        update = self._update(mine, whole) if mine else whole
        for matrix, piece in zip(owned, self._swapped(update, sizes_of_mine, sizes).split(sizes), strict=True):
            if matrix:
                self._add(matrix, piece, lr)

    def _swapped(self, given: torch.Tensor, sizes: list[int], sizes_taken: list[int]) -> torch.Tensor:
        """What each rank gives this one, one after another; of `given` they get `sizes`."""
        taken = given.new_empty(sum(sizes_taken))
        torch_dist.all_to_all_single(taken, given, sizes_taken, sizes, group=self._process_group)
        return taken

    def _broadcast(self, owned: Owned, lr: float) -> None:
        """Every rank has the matrices whole: the one that owns a matrix computes the update for all."""
        mine = owned[self._rank]
        update = self._update(mine, self._piece(mine)) if mine else None
        for owner, matrix in enumerate(owned):
            if matrix:
                given = update if owner == self._rank else torch.empty_like(matrix.tensor, dtype=self._dtype).view(-1)
                torch_dist.broadcast(given, group_src=owner, group=self._process_group)
                self._add(matrix, given, lr)

    def _update(self, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return orthogonalized(whole.view(matrix.shape)).flatten()

    def _piece(self, matrix: Matrix) -> torch.Tensor:
        """This rank's piece of what is made orthogonal."""
        return self._of(matrix, matrix.tensor.grad).to(self._dtype)

    def _add(self, matrix: Matrix, piece: torch.Tensor, lr: float) -> None:
        self._of(matrix, matrix.tensor).add_(piece, alpha=-lr * RMS * math.sqrt(max(matrix.shape)))

    def _of(self, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1)[matrix.place : matrix.place + matrix.size(self._rank)]
