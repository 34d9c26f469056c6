"""Logits and labels -> sums of the loss. Sums, not means: the mean is over the whole global batch, which only the
engine knows.

The losses of a language model are computed where its output matrix is: output.py.

Shapes: B batch, T time, N positions, L labels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED = -100  # torch's convention for the label of a position that is no target


def loss_rows(
    model: Callable, inputs: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None,
    z_loss: float = 0.0, sparse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The summed loss of each row [B]. `sparse`, for objectives with few targets: logits of those positions only."""
    at = labels != IGNORED if sparse else None
    return model(inputs, documents=documents, at=at, labels=labels, z_loss=z_loss)


def score_rows(
    model: Callable, inputs: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """For evaluation: of each row the summed loss, and the targets whose likeliest token is the right one: [B, 2]."""
    return model(inputs, documents=documents, at=labels != IGNORED, labels=labels, with_hits=True)


def cross_entropy_rows(logits_BTL: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in nats, of each row [B], in fp32 or better; labels of -100 do not count."""
    losses_N = F.cross_entropy(
        _wide(logits_BTL).flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
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


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 for what is less precise."""
    return torch.promote_types(dtype, torch.float32)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(wide(logits.dtype))
