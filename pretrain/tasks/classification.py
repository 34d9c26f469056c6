"""Labels of texts, or of pairs of texts: one each, or any number of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pretrain import metrics
from pretrain.config import TaskConfig
from pretrain.data.objectives import IGNORE
from pretrain.data.tables import Table
from pretrain.data.tasks import ExampleRows, Examples, Ragged, make_examples
from pretrain.model.losses import label_rows, multi_label_rows
from pretrain.tasks.task import Inputs, Problems, Task, whole_text


class Classification(Task):
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
        found = {label for labels in _labels(config, table) for label in labels}
        if len(found) < 2:
            raise ValueError(f"{table.location} has only the label {', '.join(found)}: there is nothing to tell apart")
        return replace(config, labels=sorted(found))

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        config, problems = self.config, Problems(table, self.config.drop_bad and with_gold)
        texts = self.tokenizer.encode_batch(table.texts(config.text, "task.text"))
        pairs = [None] * len(texts)
        if config.text_pair:
            pairs = self.tokenizer.encode_batch(table.texts(config.text_pair, "task.text_pair"))
        gold = _labels(config, table) if with_gold else [[]] * len(texts)
        rows, inputs, segments, labels = [], [], [], []
        for row, (text, pair, names) in enumerate(zip(texts, pairs, gold, strict=True)):
            if unknown := [name for name in names if name not in self.numbers]:
                problems.add(row, f"the label {unknown[0]!r} is none of {', '.join(self.labels)}")
                continue
            ids, kinds = whole_text(self.tokenizer, self.model, text, self.seq_len, pair)
            rows.append(row)
            inputs.append(ids)
            segments.append(kinds)
            labels.append(self._label_of(names, with_gold))
        problems.settle(len(rows))
        columns = {"inputs": Ragged(inputs), "labels": Ragged(labels)}
        if config.text_pair and self.model.segments > 1:
            columns["segments"] = Ragged(segments, np.int8)
        return make_examples(columns, rows, dropped=problems.found)

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
        texts = table.texts(self.config.text, "task.text")
        labels, count = examples.columns["labels"], len(self.labels)
        key, facts = "label", {}
        if self.config.multi_label:
            key = "labels"
            figures = metrics.multi_label(labels.values.reshape(-1, count) > 0, predictions > 0.5)
        else:
            figures = metrics.classification(labels.values, predictions.argmax(1), self.labels)
            table_of = metrics.confusion(labels.values, predictions.argmax(1), count)
            facts = {"labels": self.labels, "confusion": table_of.tolist()}
        details = []
        for number, told in enumerate(self.outputs(table, examples, predictions)):
            gold = self._names(labels[number])
            details.append({"text": texts[examples.rows[number]], "gold": gold, "prediction": told[key],
                            "right": told[key] == gold, "score": float(predictions[number].max())})  # fmt: skip
        return figures, details, facts

    def _label_of(self, names: list[str], with_gold: bool) -> list[int]:
        if self.config.multi_label:
            return [int(label in names) if with_gold else IGNORE for label in self.labels]
        return [self.numbers[names[0]] if names else IGNORE]

    def _names(self, labels: np.ndarray) -> str | list[str]:
        if self.config.multi_label:
            return [self.labels[number] for number in np.flatnonzero(labels > 0)]
        return self.labels[labels[0]]


def _labels(config: TaskConfig, table: Table) -> list[list[str]]:
    """The labels of each row as text; numbers and booleans are labels as well."""
    column = table.column(config.label, "task.label")
    for row, value in enumerate(column):
        if config.multi_label != isinstance(value, list):
            wanted = "a list of labels" if config.multi_label else "one label (task.multi_label=true is for lists)"
            raise ValueError(f"{table.place(row)}: {config.label}={value!r} must be {wanted}")
    return [[str(label) for label in (value if config.multi_label else [value])] for value in column]
