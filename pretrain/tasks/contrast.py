"""The contrastive loss between all pairs of a global batch, in the memory of one micro-batch.

Each query is to find its document among all documents of the batch, and each document its query (InfoNCE: van den Oord
et al., 2018; both ways: Radford et al., CLIP, 2021). First the vectors of all micro-batches of all ranks are computed
without a graph, and from them the gradient of the loss in each vector; then the ordinary pass of a micro-batch carries
that gradient into the weights (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
2021). So loss and gradient are those of the whole batch, however ranks and micro-batches split it.

Shapes: n pairs of this rank, N of all ranks, D width. Of each pair comes the query first, then the document.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pretrain.dist import all_gather_tensor

CELLS_AT_ONCE = 1 << 24  # of the table of similarities: 64 MiB
SIDES = ("", "_document")  # what the names of a batch's tensors end in

Batch = dict[str, torch.Tensor]


class Pairs(NamedTuple):
    """`vectors` [n, 2, D] of length 1; `texts` int64 [n, 2]: the same number is the same text."""

    vectors: torch.Tensor
    texts: torch.Tensor

    def similarities(self) -> torch.Tensor:
        """The cosine between the two texts of each pair [n]."""
        return self.vectors.prod(1).sum(1)


class BatchContrast:
    """The loss of each pair in a global batch, as `Engine` takes it: `across` first, for all micro-batches together.

    A pair with the same query or the same document as another is no negative of it.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature

    def across(self, run: Callable[[int, Callable], torch.Tensor], micro_batches: list[Batch]) -> list[Batch]:
        """Adds to each micro-batch the `loss` [b] of its pairs, and `gradient` [b, 2, D]: that of the sum of all pairs'
        losses over all ranks, in its vectors. Every rank must have the same number of pairs.
        """
        vectors = torch.cat([run(number, pair_vectors) for number in range(len(micro_batches))])
        mine = Pairs(vectors, torch.cat([batch["texts"] for batch in micro_batches]))
        everyone = Pairs(*map(_of_all_ranks, mine))
        normalisers = log_normalisers(mine, everyone, self.temperature)
        losses = pair_losses(mine, normalisers, self.temperature)
        gradient = gradients(mine, everyone, normalisers, _of_all_ranks(normalisers), self.temperature)
        sizes = [len(batch["texts"]) for batch in micro_batches]
        parts = zip(micro_batches, losses.split(sizes), gradient.split(sizes), strict=True)
        return [batch | {"loss": loss, "gradient": part} for batch, loss, part in parts]

    def __call__(self, model: Any, loss: torch.Tensor, gradient: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        """What `across` found, [b], with a graph that takes its gradient into the model."""
        pull = (pair_vectors(model, **batch) * gradient).sum((1, 2))
        return loss + (pull - pull.detach())


def pair_vectors(model: Any, **batch: torch.Tensor) -> torch.Tensor:
    """The vectors of the texts of each row, [b, 2, D]; [b, 1, D] where there are only queries."""
    sides = [side for side in SIDES if f"inputs{side}" in batch]
    return torch.stack([model(batch[f"inputs{side}"], documents=batch[f"documents{side}"]) for side in sides], 1)


def pair_losses(mine: Pairs, normalisers: torch.Tensor, temperature: float) -> torch.Tensor:
    """The loss of each pair [n], in nats: the mean of -log p(its document | its query) and -log p(query | document)."""
    return normalisers.mean(1) - mine.similarities() / temperature


def log_normalisers(mine: Pairs, everyone: Pairs, temperature: float) -> torch.Tensor:
    """The logarithm of the softmax's denominator [n, 2], of queries over documents and of documents over queries."""
    own, found = mine.similarities() / temperature, torch.empty_like(mine.vectors[:, :, 0])
    for side, rows, scores in _negatives(mine, everyone, temperature):
        found[rows, side] = torch.logaddexp(scores.logsumexp(1), own[rows])
    return found


def gradients(
    mine: Pairs, everyone: Pairs, normalisers: torch.Tensor, their_normalisers: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The gradient of the sum of everyone's losses in this rank's vectors [n, 2, D], by its formula: a vector stands in
    its own softmax and in those of all others. `normalisers` [n, 2] and `their_normalisers` [N, 2]: `log_normalisers`.
    """
    found = torch.empty_like(mine.vectors)
    for side, rows, scores in _negatives(mine, everyone, temperature):
        chosen = (scores - normalisers[rows, side, None]).exp_() + (scores - their_normalisers[:, 1 - side]).exp_()
        found[rows, side] = chosen @ everyone.vectors[:, 1 - side]
    own = mine.similarities()[:, None] / temperature
    pulled = (own - normalisers).exp().sum(1) - 2
    return (found + pulled[:, None, None] * mine.vectors.flip(1)) / (2 * temperature)


def _negatives(mine: Pairs, everyone: Pairs, temperature: float) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(side, rows, scores [k, N]): texts of this rank, some at once, with everyone's of the other side; -inf where
    the pairs share a text, as a pair does with itself.
    """
    size = max(1, CELLS_AT_ONCE // len(everyone.texts))
    for start in range(0, len(mine.texts), size):
        rows = slice(start, start + size)
        shared = (mine.texts[rows, None] == everyone.texts).any(2)
        for side in (0, 1):
            scores = mine.vectors[rows, side] @ everyone.vectors[:, 1 - side].T / temperature
            yield side, rows, scores.masked_fill_(shared, -torch.inf)


def _of_all_ranks(values: torch.Tensor) -> torch.Tensor:
    return all_gather_tensor(values).flatten(0, 1)
