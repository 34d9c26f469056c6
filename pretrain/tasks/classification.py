"""Labels of texts, or of pairs of texts: one each, or any number of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pretrain.cli import among
from pretrain.config.schema import TaskConfig
from pretrain.evaluation import metrics
from pretrain.examples.stream import ExampleRows, Examples, Ragged, make_examples
from pretrain.examples.tables import Column, Table, is_nan
from pretrain.model.losses import label_rows, multi_label_rows
from pretrain.stream.objectives import IGNORE
from pretrain.tasks.task import HeadTask, Inputs, read_rows, tell_alike, whole_length, whole_text


class Classification(HeadTask):
    """One label a text: softmax and macro-F1; `multi_label`: a sigmoid for each label, and micro-F1."""

    head = "sequence"

    def __init__(self, config: TaskConfig, *others: Any):
        super().__init__(config, *others)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.best = "val_micro_f1" if config.multi_label else "val_macro_f1"
        self.figures = ("micro_f1", "macro_f1", "subset_accuracy") if config.multi_label else ("macro_f1", "accuracy")
        self.weights: torch.Tensor | None = None

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        """The labels of a table, sorted."""
        if config.labels is not None:
            return config
        _, read, _ = read_rows(table, _reader(config, table), config.drop_bad)
        found = {label for _, labels in read for label in labels}
        if len(found) < 2:
            raise ValueError(f"{table.location} has only the label {', '.join(found)}: there is nothing to tell apart")
        tell_alike(found, table.location)
        return replace(config, labels=sorted(found))

    def check_room(self, texts: int = 1) -> None:
        super().check_room(2 if self.config.text_pair else texts)

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        read = _reader(self.config, table, with_gold)

        def read_known(row: int) -> tuple[list[str], list[str]]:
            texts, names = read(row)
            if unknown := [name for name in names if name not in self.numbers]:
                raise ValueError(f"the label {unknown[0]!r} is none of {among(unknown[0], self.labels)}")
            return texts, names

        rows, found, dropped = read_rows(table, read_known, self.config.drop_bad, with_gold)
        sides = [self.tokenizer.encode_batch(list(side)) for side in zip(*(texts for texts, _ in found), strict=True)]
        made = [whole_text(self.tokenizer, self.model, first, self.seq_len, *second)
                for first, *second in zip(*sides, strict=True)]  # fmt: skip
        columns = {
            "inputs": Ragged(ids for ids, _ in made),
            "labels": Ragged(self._label_of(names, with_gold) for _, names in found),
        }
        if len(sides) > 1 and self.model.segments > 1:
            columns["segments"] = Ragged((segments for _, segments in made), np.int8)
        whole = (whole_length(self.tokenizer, self.model, *texts) for texts in zip(*sides, strict=True))
        return make_examples(columns, rows, dropped=dropped, whole=whole)

    def weigh(self, examples: Examples) -> None:
        """`class_weights=balanced`: each label counts as much in these examples as any other."""
        if self.config.class_weights == "balanced" and not self.config.multi_label:
            counts = np.bincount(examples.columns["labels"].values, minlength=len(self.labels))
            weights = counts.sum() / (len(self.labels) * np.maximum(counts, 1))
            self.weights = torch.from_numpy(weights.astype(np.float32))

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        batch = super().collate(rows)
        return batch if self.config.multi_label else batch | {"labels": batch["labels"][:, 0]}

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.config.multi_label:
            return multi_label_rows(logits, labels)
        return label_rows(logits, labels, None if self.weights is None else self.weights.to(logits.device))

    def predictions(self, logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The probability of each label [B, C]."""
        return logits.float().sigmoid() if self.config.multi_label else logits.float().softmax(1)

    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        made = []
        for scores in predictions:
            told = {"label": self.labels[int(scores.argmax())]}
            if self.config.multi_label:
                told = {"labels": [self.labels[number] for number in np.flatnonzero(scores > 0.5)]}
            rounded = {label: round(float(score), 6) for label, score in zip(self.labels, scores, strict=True)}
            made.append(told | {"scores": rounded})
        return made

    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        labels, count = examples.columns["labels"], len(self.labels)
        key, facts = "label", {}
        if self.config.multi_label:
            key = "labels"
            figures = metrics.multi_label(labels.values.reshape(-1, count) > 0, predictions > 0.5)
        else:
            figures = metrics.classification(labels.values, predictions.argmax(1), self.labels)
            table_of = metrics.confusion(labels.values, predictions.argmax(1), count)
            facts = {"labels": self.labels, "confusion": table_of.tolist()}
            facts["per_label"] = metrics.per_label(table_of, self.labels)
        details = []
        for number, told in enumerate(self.outputs(table, examples, predictions)):
            gold = self._names(labels[number])
            text = table.rows[examples.rows[number]][self.config.text]
            details.append({"text": text, "gold": gold, "prediction": told[key], "right": told[key] == gold,
                            "score": float(predictions[number].max())})  # fmt: skip
        return figures, details, facts

    def _label_of(self, names: list[str], with_gold: bool) -> list[int]:
        if self.config.multi_label:
            return [int(label in names) if with_gold else IGNORE for label in self.labels]
        return [self.numbers[names[0]] if names else IGNORE]

    def _names(self, labels: np.ndarray) -> str | list[str]:
        if self.config.multi_label:
            return [self.labels[number] for number in np.flatnonzero(labels > 0)]
        return self.labels[labels[0]]


def _reader(
    config: TaskConfig, table: Table, with_gold: bool = True
) -> Callable[[int], tuple[list[str], list[str]]]:  # fmt: skip
    """What reads a row: its text, or two, and its labels as text; numbers and booleans are labels as well."""
    columns = [table.column(config.text, "task.text")]
    if config.text_pair:
        columns.append(table.column(config.text_pair, "task.text_pair"))
    gold = table.column(config.label, "task.label") if with_gold else None

    def read(row: int) -> tuple[list[str], list[str]]:
        return [column.text(row) for column in columns], _names_in(gold, row, config.multi_label) if gold else []

    return read


def _names_in(column: Column, row: int, multi_label: bool) -> list[str]:
    value = column.value(row)
    wanted = "a list of labels" if multi_label else "one label (task.multi_label=true is for lists)"
    listed = value if isinstance(value, list) else [value]
    is_right = multi_label == isinstance(value, list) and all(isinstance(label, str | int | float) for label in listed)
    is_right = is_right and not any(is_nan(label) for label in listed)
    if not is_right or not all(str(label).strip() for label in listed):
        raise ValueError(f"{column.name}={value!r} must be {wanted}, each a text, a number or a boolean")
    return [str(label) for label in listed]
