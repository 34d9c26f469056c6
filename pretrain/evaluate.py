"""Validation loss and bits per byte, the same for every number of ranks."""

import math
from collections.abc import Callable

import numpy as np
import torch

from pretrain.data.objectives import IGNORE, batch_of
from pretrain.data.stream import Stream
from pretrain.dist import Ranks, all_gather_tensor

EvaluateRows = Callable[..., torch.Tensor]


class Validation:
    """`samples` windows spread evenly over the held-out shards (0: all of them), the same at every evaluation."""

    def __init__(
        self, stream: Stream, objective: Callable, samples: int, micro_batch_size: int, byte_lengths: np.ndarray
    ):  # fmt: skip
        """`byte_lengths` [vocab]: bytes of text of each token id, so that bits per byte is exact on any windows."""
        self.stream, self.objective, self.byte_lengths = stream, objective, byte_lengths
        count = min(samples, stream.epoch_samples) or stream.epoch_samples
        self.windows = np.arange(count) * stream.epoch_samples // count
        self.micro_batch_size = micro_batch_size

    def run(self, evaluate_rows: EvaluateRows, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """`evaluate_rows(*batch)` gives each row's summed loss in nats, `batch` as `objectives.batch_of` makes it. On
        all ranks; each takes rows r::w.

        Sums are gathered a row at a time and added in the order of the windows, so the split leaves no trace.
        """
        count = len(self.windows)
        each = -(-count // ranks.world_size)
        places = np.arange(each) * ranks.world_size + ranks.rank
        sums = torch.zeros(each, 3, dtype=torch.float64)
        for start in range(0, each, self.micro_batch_size):
            mine = places[start : start + self.micro_batch_size]
            batch = batch_of(self.objective, self.stream.rows(self.windows[np.minimum(mine, count - 1)]))
            labels = batch[1]
            labels[mine >= count] = IGNORE  # padding: every rank computes equally often, as ZeRO-3 needs
            counted = labels != IGNORE
            text_bytes = np.where(counted, self.byte_lengths[np.where(counted, labels, 0)], 0).sum(1)
            losses = evaluate_rows(*(torch.from_numpy(part).to(device) for part in batch))
            rows = (losses, torch.from_numpy(counted.sum(1)), torch.from_numpy(text_bytes))
            sums[start : start + len(mine)] = torch.stack([row.double() for row in rows], 1)
        in_order = all_gather_tensor(sums).transpose(0, 1).flatten(0, 1)[:count]
        nats, targets, text_bytes = (math.fsum(column) for column in in_order.T.tolist())
        return {"val_loss": nats / targets, "val_bits_per_byte": nats / math.log(2) / text_bytes}
