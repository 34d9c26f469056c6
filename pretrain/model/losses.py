"""Logits and labels -> sums of the loss. Sums, not means: the mean is over the whole global batch, which only the
engine knows.

Shapes: B batch, T time, N = B x T positions, V vocabulary.
"""

import torch

IGNORED = -100  # torch's convention for the label of a position that is no target
POSITIONS_AT_ONCE = 8  # on a CPU: their fp32 logits stay in the cache
POSITIONS_AT_ONCE_GPU = 1024


def cross_entropy_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in nats, of each row [B], in fp32 or better; labels of -100 do not count.

    The backward pass writes the gradient over the logits: read them before it. (Autograd raises if it needs them.)
    """
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten()).view(labels_BT.shape).sum(1)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each position, computed in fp32 from logits of any precision.

    A few positions at a time in one buffer, and the gradient in place of the logits (as Liger, Hsu et al., 2024, does):
    torch's own keeps fp32 logits, log-probabilities and gradient of all positions, which for a small model with a
    large vocabulary is most of the memory and a third of the time of a step.
    """

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        normalisers, losses = [], []
        for logits, labels, buffer in _parts(logits_NV, labels_N):
            largest = buffer.copy_(logits).amax(1, keepdim=True)
            picked = buffer.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            normaliser = buffer.sub_(largest).exp_().sum(1).log_() + largest[:, 0]
            losses.append(torch.where(labels == IGNORED, 0.0, normaliser - picked))
            normalisers.append(normaliser)
        ctx.save_for_backward(logits_NV, labels_N, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(logits) - onehot(label), times the gradient of each position's loss."""
        logits_NV, labels_N, normalisers_N = ctx.saved_tensors
        scales = torch.where(labels_N == IGNORED, 0.0, gradient_N)[:, None]
        start = 0
        for logits, labels, buffer in _parts(logits_NV, labels_N):
            part = slice(start, start := start + len(labels))
            probabilities = torch.sub(logits, normalisers_N[part, None], out=buffer).exp_()
            probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], probabilities.new_full((len(labels), 1), -1.0))
            logits.copy_(probabilities.mul_(scales[part]))
        return logits_NV, None


def _parts(logits_NV: torch.Tensor, labels_N: torch.Tensor):
    """Views of both in parts of positions, and a buffer of the part's shape in fp32 (fp64 for fp64)."""
    at_once = POSITIONS_AT_ONCE if logits_NV.device.type == "cpu" else POSITIONS_AT_ONCE_GPU
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    buffer = logits_NV.new_empty((min(at_once, len(labels_N)), logits_NV.shape[1]), dtype=dtype)
    for logits, labels in zip(logits_NV.split(at_once), labels_N.split(at_once), strict=True):
        yield logits, labels, buffer[: len(labels)]
