"""Logits and labels -> sums of the loss. Sums, not means: the mean is over the whole global batch, which only the
engine knows.

Shapes: B batch, T time, N = B x T positions, V vocabulary.
"""

import torch

IGNORED = -100  # torch's convention for the label of a position that is no target
POSITIONS_AT_ONCE = 256  # their fp32 logits stay in the cache


def cross_entropy_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in nats, of each row [B], in fp32 or better; labels of -100 do not count."""
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten()).view(labels_BT.shape).sum(1)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each position, computed in fp32 from logits of any precision.

    A part of the positions at a time: torch's own keeps fp32 logits and log-probabilities of all of them, which for a
    large vocabulary is most of the memory and a third of the time of a small model's step.
    """

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        normalisers, losses = [], []
        for logits, labels in _parts(logits_NV, labels_N):
            normaliser = logits.logsumexp(1)
            picked = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            losses.append(torch.where(labels == IGNORED, 0.0, normaliser - picked))
            normalisers.append(normaliser)
        ctx.save_for_backward(logits_NV, labels_N, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(logits) - onehot(label), times the gradient of each position's loss."""
        logits_NV, labels_N, normalisers_N = ctx.saved_tensors
        result = torch.empty_like(logits_NV)
        gradient_N = torch.where(labels_N == IGNORED, 0.0, gradient_N)
        places = (gradient_N, normalisers_N, result)
        parts = zip(_parts(logits_NV, labels_N), *(tensor.split(POSITIONS_AT_ONCE) for tensor in places), strict=True)
        for (logits, labels), gradient, normaliser, out in parts:
            probabilities = torch.sub(logits, normaliser[:, None]).exp_()
            ones = probabilities.new_full((len(labels), 1), -1.0)
            probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], ones)
            out.copy_(probabilities.mul_(gradient[:, None]))
        return result, None


def _parts(logits_NV: torch.Tensor, labels_N: torch.Tensor):
    """Both in parts of positions, the logits in fp32 at least."""
    for logits, labels in zip(logits_NV.split(POSITIONS_AT_ONCE), labels_N.split(POSITIONS_AT_ONCE), strict=True):
        yield logits if logits.dtype == torch.float64 else logits.float(), labels
