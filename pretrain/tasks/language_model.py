"""Further pretraining on texts, next to each other in windows: bits per byte, or what a masked model gets right.

The windows, their targets and their masks are those of pretraining (`stream.packing.Windows`, `stream.objectives`), and
so are the figures. Shapes: B batch, T time.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pretrain.config import checks
from pretrain.examples.stream import ExampleRows, Examples, Ragged, make_examples
from pretrain.examples.tables import Table
from pretrain.model import losses
from pretrain.stream import packing
from pretrain.stream.objectives import IGNORE, MaskedLM, batch_of, make_objective
from pretrain.stream.stream import Rows
from pretrain.tasks.task import Task, read_rows


class LanguageModel(Task):
    """Each next token; a model that looks ahead fills in what is masked."""

    head = "lm"

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        checks.check_objective(self.objective, replace(self.model, head="lm"))  # the head that it is given
        self.ask = make_objective(self.objective, self.tokenizer, self.seed)
        self.is_sparse = isinstance(self.ask, MaskedLM)  # few places have a target
        self.byte_lengths = None if self.is_sparse else self.tokenizer.byte_lengths()
        has_bits = self.byte_lengths is not None
        self.figures = ("accuracy", "bits_per_byte") if has_bits else ("accuracy",)
        self.best = "val_bits_per_byte" if has_bits else "val_loss"

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        """Windows of all texts, one after the other; without gold, to tell of each text, those of each by itself."""
        before, after = self.tokenizer.prefix, self.tokenizer.suffix
        read = table.column(self.config.text, "task.text").text
        rows, found, dropped = read_rows(table, read, self.config.drop_bad, with_gold)
        texts = self.tokenizer.encode_batch(found)
        lengths = np.array([len(before) + len(ids) + len(after) for ids in texts])
        tokens = np.array([id_ for ids in texts for id_ in (*before, *ids, *after)], dtype=np.int32)
        ends = np.array([len(tokens)]) if with_gold else lengths.cumsum()
        starts, sizes = packing.cut(np.append(0, ends[:-1]), np.diff(ends, prepend=0), self.seq_len)
        starts, sizes = starts[sizes > 1], sizes[sizes > 1]  # one token alone has no target
        if not len(starts):
            raise ValueError(f"{table.location} has no text of more than one token: there is nothing to predict")
        windows = [tokens[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        return self.examples({"inputs": Ragged(windows)}, np.repeat(rows, lengths)[starts], dropped=dropped)

    def examples(self, columns: dict[str, Ragged], rows: Sequence[int], **others: Any) -> Examples:
        """Examples whose last token is not read, only predicted."""
        made = make_examples(columns, rows, **others)
        return replace(made, lengths=made.lengths - 1)

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        column = rows.examples.columns["inputs"]
        tokens = column.padded(rows.numbers, 0)
        is_target = np.arange(1, tokens.shape[1]) < column.lengths[rows.numbers, None]
        return batch_of(self.ask, Rows(rows.sample_numbers, tokens, is_target))

    def loss_rows(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        z_loss, sparse = self.objective.z_loss, self.is_sparse
        return losses.loss_rows(model, labels=labels, **inputs, z_loss=z_loss, sparse=sparse)

    def score_rows(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The predictions: the summed loss, the number of targets, and of those whose likeliest token is right."""
        loss_B, hits_B = losses.score_rows(model, labels=labels, **inputs).double().unbind(1)
        counts_B = (labels != IGNORE).sum(1)
        return torch.stack([loss_B, counts_B, loss_B, counts_B, hits_B], 1)

    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        """How likely each text is to the model; null where it has no token to predict."""
        ends = examples.rows.searchsorted(np.arange(len(table.rows) + 1))
        numbers = (np.arange(start, end) for start, end in itertools.pairwise(ends))
        told = (self._figures(examples, predictions, of_row) for of_row in numbers)
        return [{name: None if math.isnan(value) else value for name, value in figures.items()} for figures in told]

    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        figures = self._figures(examples, predictions, np.arange(len(examples)))
        return {name: figures[name] for name in self.figures if name in figures}, [], {}

    def _figures(self, examples: Examples, predictions: np.ndarray, numbers: np.ndarray) -> dict[str, float]:
        """Of some examples; nan where they have no target."""
        nats, count, hits = (math.fsum(column) for column in predictions[numbers].T.tolist())
        found = {"loss": nats / count if count else math.nan, "accuracy": hits / count if count else math.nan}
        if self.byte_lengths is not None:
            column = examples.columns["inputs"]
            text_bytes = sum(int(self.byte_lengths[column[number][1:]].sum()) for number in numbers)
            found["bits_per_byte"] = nats / math.log(2) / text_bytes if text_bytes else math.nan
        return found
