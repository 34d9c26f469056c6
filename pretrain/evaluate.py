"""Validation loss, and bits per byte or accuracy, the same for every number of ranks."""

import math
from collections.abc import Callable

import numpy as np
import torch

from pretrain.data.objectives import IGNORE, MaskedLM, batch_of
from pretrain.data.stream import Stream
from pretrain.dist import Ranks, all_gather_tensor
from pretrain.model.losses import loss_rows, score_rows

Evaluate = Callable[..., torch.Tensor]


class Validation:
    """`samples` windows spread evenly over the held-out shards (0: all of them), the same at every evaluation.

    What a masked model is asked about them is the same too: it depends on the seed and the window.
    """

    def __init__(
        self, stream: Stream, objective: Callable, samples: int, micro_batch_size: int, byte_lengths: np.ndarray | None
    ):  # fmt: skip
        """`byte_lengths` [vocab]: bytes of text of each token id, so that bits per byte is exact on any windows; None
        where the tokenizer loses text.
        """
        self.stream, self.objective, self.byte_lengths = stream, objective, byte_lengths
        self.is_masked = isinstance(objective, MaskedLM)
        self.score_rows = score_rows if self.is_masked else loss_rows
        count = min(samples, stream.epoch_samples) or stream.epoch_samples
        self.windows = np.arange(count) * stream.epoch_samples // count
        self.micro_batch_size = micro_batch_size

    def run(self, evaluate: Evaluate, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """`evaluate(score_rows, *batch)` gives what `losses.loss_rows` or `score_rows` says of the model and a `batch`
        as `objectives.batch_of` makes it. On all ranks; each takes rows r::w.

        Sums are gathered a row at a time and added in the order of the windows, so the split leaves no trace.
        """
        count = len(self.windows)
        each = -(-count // ranks.world_size)
        places = np.arange(each) * ranks.world_size + ranks.rank
        sums = torch.zeros(each, 4, dtype=torch.float64)
        for start in range(0, each, self.micro_batch_size):
            mine = places[start : start + self.micro_batch_size]
            batch = batch_of(self.objective, self.stream.rows(self.windows[np.minimum(mine, count - 1)]))
            labels = batch[1]
            labels[mine >= count] = IGNORE  # padding: every rank computes equally often, as ZeRO-3 needs
            facts = torch.from_numpy(np.stack([(labels != IGNORE).sum(1), self._text_bytes(labels)], 1))
            scores = evaluate(self.score_rows, *(torch.from_numpy(part).to(device) for part in batch))
            rows = torch.cat([facts.double(), scores.double().view(len(mine), -1)], 1)
            sums[start : start + len(mine), : rows.shape[1]] = rows
        in_order = all_gather_tensor(sums).transpose(0, 1).flatten(0, 1)[:count]
        targets, text_bytes, nats, hits = (math.fsum(column) for column in in_order.T.tolist())
        result = {"val_loss": nats / targets if targets else math.nan}
        if self.is_masked:
            return result | {"val_accuracy": hits / targets if targets else math.nan}
        return result | ({"val_bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {})

    def _text_bytes(self, labels: np.ndarray) -> np.ndarray:
        """Bytes of the text of each row's targets; 0 where they are not known."""
        if self.byte_lengths is None:
            return np.zeros(len(labels), dtype=np.int64)
        counted = labels != IGNORE
        return np.where(counted, self.byte_lengths[np.where(counted, labels, 0)], 0).sum(1)
