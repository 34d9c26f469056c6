"""Logits and labels -> sums of the loss. Sums, not means: the mean is over the whole global batch, which only the
engine knows."""

import torch
import torch.nn.functional as F


def cross_entropy_rows(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in nats, of each row [B], in fp32; labels of -100 (torch's convention) do not count."""
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="none")
    return losses.view(labels_BT.shape).sum(1)
