"""Logits and labels -> sums of the loss. Sums, not means: the mean is over the whole global batch, which only the
engine knows.

Shapes: B batch, T time, N positions (B x T, or those with a label), V vocabulary, L labels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED = -100  # torch's convention for the label of a position that is no target
POSITIONS_AT_ONCE = 8  # on a CPU: their fp32 logits stay in the cache
POSITIONS_AT_ONCE_GPU = 1024


def loss_rows(
    model: Callable, inputs: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None,
    z_loss: float = 0.0, sparse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The summed loss of each row [B]. `sparse`, for objectives with few targets: logits of those positions only."""
    if not sparse:
        return cross_entropy_rows(model(inputs, documents=documents), labels, z_loss)
    losses_N, _ = _at_targets(model, inputs, labels, documents, z_loss)
    return _sum_rows(losses_N, labels)


def score_rows(
    model: Callable, inputs: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """For evaluation: of each row the summed loss, and the targets whose likeliest token is the right one: [B, 2]."""
    losses_N, logits_NV = _at_targets(model, inputs, labels, documents)
    hits_N = logits_NV.argmax(1) == labels[labels != IGNORED]
    return torch.stack([_sum_rows(losses_N, labels), _sum_rows(hits_N.to(losses_N.dtype), labels)], 1)


def cross_entropy_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, z_loss: float = 0.0) -> torch.Tensor:
    """Sum of -log p(label), in nats, of each row [B], in fp32 or better; labels of -100 do not count.

    `z_loss` times the squared log of the softmax's normaliser is added for each label, which keeps logits from
    drifting (Chowdhery et al., PaLM, 2022, section 5).
    The backward pass writes the gradient over the logits: read them before it. (Autograd raises if it needs them.)
    """
    losses_N = _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten(), z_loss)
    return losses_N.view(labels_BT.shape).sum(1)


def label_rows(logits_BL: torch.Tensor, labels_B: torch.Tensor, weights_L: torch.Tensor | None = None) -> torch.Tensor:
    """-log p(label) of each row [B], in fp32 or better, times the weight of its label where there are weights."""
    return F.cross_entropy(_wide(logits_BL), labels_B, weights_L, ignore_index=IGNORED, reduction="none")


def multi_label_rows(logits_BL: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """The binary cross-entropies of all labels (0 or 1; -100: not known), summed for each row [B]."""
    logits_BL = _wide(logits_BL)
    losses_BL = F.binary_cross_entropy_with_logits(logits_BL, labels_BL.to(logits_BL.dtype), reduction="none")
    return losses_BL.masked_fill(labels_BL == IGNORED, 0.0).sum(1)


def span_rows(logits_BT2: torch.Tensor, labels_B2: torch.Tensor) -> torch.Tensor:
    """-log p(the answer begins here) - log p(it ends here) of each row [B]: two targets, each out of all T places."""
    return F.cross_entropy(_wide(logits_BT2), labels_B2, ignore_index=IGNORED, reduction="none").sum(1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at_targets(
    model: Callable, inputs: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss [N] and the logits [N, V] of the positions that have a label, row after row; there may be none."""
    at = labels != IGNORED
    logits_NV = model(inputs, documents=documents, at=at)
    return _CrossEntropy.apply(logits_NV, labels[at], z_loss), logits_NV


def _sum_rows(values_N: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B] out of the values of the positions that have a label. A sum over places, in an order that never varies."""
    at = labels != IGNORED
    return values_N.new_zeros(labels.shape).masked_scatter(at, values_N).sum(1)


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] of each position, computed in fp32 from logits of any precision, and its z-loss.

    A few positions at a time in one buffer, and the gradient in place of the logits (as Liger, Hsu et al., 2024, does):
    torch's own keeps fp32 logits, log-probabilities and gradient of all positions, which for a small model with a
    large vocabulary is most of the memory and a third of the time of a step.
    """

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, labels_N: torch.Tensor, z_loss: float) -> torch.Tensor:
        normalisers, losses = [], []
        for logits, labels, buffer in _parts(logits_NV, labels_N):
            largest = buffer.copy_(logits).amax(1, keepdim=True)
            picked = buffer.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            normaliser = buffer.sub_(largest).exp_().sum(1).log_() + largest[:, 0]
            loss = normaliser - picked + z_loss * normaliser.square() if z_loss else normaliser - picked
            losses.append(torch.where(labels == IGNORED, 0.0, loss))
            normalisers.append(normaliser)
        ctx.save_for_backward(logits_NV, labels_N, torch.cat(normalisers))
        ctx.z_loss = z_loss
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """softmax(logits) x (1 + 2 z log normaliser) - onehot(label), times the gradient of each position's loss."""
        logits_NV, labels_N, normalisers_N = ctx.saved_tensors
        scales = torch.where(labels_N == IGNORED, 0.0, gradient_N)[:, None]
        start = 0
        for logits, labels, buffer in _parts(logits_NV, labels_N):
            part = slice(start, start := start + len(labels))
            probabilities = torch.sub(logits, normalisers_N[part, None], out=buffer).exp_()
            if ctx.z_loss:
                probabilities.mul_(1 + 2 * ctx.z_loss * normalisers_N[part, None])
            probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], probabilities.new_full((len(labels), 1), -1.0))
            logits.copy_(probabilities.mul_(scales[part]))
        return logits_NV, None, None


def _parts(logits_NV: torch.Tensor, labels_N: torch.Tensor):
    """Views of both in parts of positions, and a buffer of the part's shape in fp32 (fp64 for fp64)."""
    at_once = POSITIONS_AT_ONCE if logits_NV.device.type == "cpu" else POSITIONS_AT_ONCE_GPU
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    buffer = logits_NV.new_empty((min(at_once, len(labels_N)), logits_NV.shape[1]), dtype=dtype)
    for logits, labels in zip(logits_NV.split(at_once), labels_N.split(at_once), strict=True):
        yield logits, labels, buffer[: len(labels)]
