"""A tag for each word of a text: names, places, ... in BIO (Ramshaw and Marcus, 1995; CoNLL-2003)."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pretrain import metrics
from pretrain.config import TaskConfig
from pretrain.data.objectives import IGNORE
from pretrain.data.tables import Table
from pretrain.data.tasks import Examples, Ragged, make_examples
from pretrain.model.losses import cross_entropy_rows
from pretrain.tasks.task import Inputs, Problems, Task, whole_text

OUTSIDE = "O"
_TAG = re.compile(r"O|[BI]-.+")


class TokenClassification(Task):
    """One token of each word has the word's tag: the first one, or the last one in a model that looks back only, which
    has seen the whole word there alone. A text is its words with single spaces between them; what is longer than
    `seq_len` is cut, and counts as outside (O) of everything when it is judged.
    """

    head = "tokens"
    best, figures = "val_span_f1", ("span_f1", "span_precision", "span_recall")

    def __init__(self, config: TaskConfig, *others: Any):
        super().__init__(config, *others)
        self.numbers = {tag: number for number, tag in enumerate(self.labels)}
        if wrong := [tag for tag in self.labels if not _TAG.fullmatch(tag)]:
            raise ValueError(f"{config.tags}: {wrong[0]!r} is no tag of BIO: write B-{wrong[0]} for the first word of "
                             f"a span, I-{wrong[0]} for its others, and O for a word outside of all")  # fmt: skip

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        """The tags of a table: O, and the others sorted."""
        if config.labels is not None:
            return config
        found = {tag for tags in _listed(table, config.tags, "task.tags") for tag in tags} - {OUTSIDE}
        if not found:
            raise ValueError(f"{table.location} has only the tag {OUTSIDE}: there is nothing to find")
        return replace(config, labels=[OUTSIDE, *sorted(found)])

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        config, problems = self.config, Problems(table, self.config.drop_bad and with_gold)
        texts = _listed(table, config.tokens, "task.tokens")
        gold = _listed(table, config.tags, "task.tags") if with_gold else [None] * len(texts)
        rows, inputs, labels, places = [], [], [], []
        for row, (words, tags) in enumerate(zip(texts, gold, strict=True)):
            if tags is not None and (problem := self._problem(words, tags)):
                problems.add(row, problem)
                continue
            ids, at = self._encoded(words)
            targets = np.full(len(ids), IGNORE)
            if tags is not None:
                targets[at[at >= 0]] = [self.numbers[tag] for tag, place in zip(tags, at, strict=True) if place >= 0]
            rows.append(row)
            inputs.append(ids)
            labels.append(targets)
            places.append(at)
        problems.settle(len(rows))
        columns = {"inputs": Ragged(inputs), "labels": Ragged(labels)}
        return make_examples(columns, rows, {"places": places}, problems.found)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return cross_entropy_rows(logits, labels)

    def predictions(self, logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The number of the likeliest tag at each token [B, seq_len]."""
        return F.pad(logits.argmax(2), (0, self.seq_len - logits.shape[1]))

    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        made = []
        for places, numbers in zip(examples.facts["places"], predictions.astype(int), strict=True):
            made.append({"tags": [self.labels[numbers[at]] if at >= 0 else OUTSIDE for at in places.tolist()]})
        return made

    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        texts = _listed(table, self.config.tokens, "task.tokens")
        gold = _listed(table, self.config.tags, "task.tags")
        predicted = [told["tags"] for told in self.outputs(table, examples, predictions)]
        details = []
        for row, tags in zip(examples.rows.tolist(), predicted, strict=True):
            details.append({"text": " ".join(texts[row]), "gold": gold[row], "prediction": tags,
                            "right": tags == gold[row]})  # fmt: skip
        return metrics.spans([row["gold"] for row in details], predicted), details, {}

    def _problem(self, words: list[str], tags: list[str]) -> str | None:
        if not words:
            return "it has no words"
        if len(words) != len(tags):
            return f"{len(words)} words ({self.config.tokens}) and {len(tags)} tags ({self.config.tags})"
        unknown = [tag for tag in tags if tag not in self.numbers]
        return f"the tag {unknown[0]!r} is none of {', '.join(self.labels)}" if unknown else None

    def _encoded(self, words: list[str]) -> tuple[list[int], np.ndarray]:
        """The ids of a text, and the place of each word's token among them, int[words]; -1 where there is none."""
        ids, spans = self.tokenizer.encode_spans(" ".join(words))
        inputs, _ = whole_text(self.tokenizer, self.model, ids.tolist(), self.seq_len)
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        ends = np.cumsum(lengths + 1) - 1
        word_of = np.searchsorted(ends, spans[:, 0], side="right")  # the word that ends first after the token's start
        inside = word_of < len(words)
        inside[inside] = (ends - lengths)[word_of[inside]] < spans[inside, 1]  # no token of a space alone
        tokens = np.flatnonzero(inside)
        if self.model.causal:
            tokens = tokens[::-1]
        found, first = np.unique(word_of[tokens], return_index=True)
        places = np.full(len(words), -1)
        places[found] = len(self.tokenizer.prefix) + tokens[first]
        room = len(inputs) - (0 if self.model.causal else len(self.tokenizer.suffix))
        places[places >= room] = -1
        return inputs, places


def _listed(table: Table, name: str, key: str) -> list[list[str]]:
    """The words or tags of each row: a list, or a text that spaces divide."""
    found = [value.split() if isinstance(value, str) else value for value in table.column(name, key)]
    for row, value in enumerate(found):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{table.place(row)}: {name}={str(value)[:80]} must be a list of texts, or one text that "
                             f"spaces divide ({key} names the column)")  # fmt: skip
    return found
