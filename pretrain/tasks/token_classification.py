"""A tag for each word of a text: names, places, ... in BIO (Ramshaw and Marcus, 1995; CoNLL-2003)."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.cli import among
from pretrain.config.schema import TaskConfig
from pretrain.evaluation import metrics
from pretrain.examples.stream import Examples, Ragged, make_examples
from pretrain.examples.tables import Column, Table
from pretrain.model.losses import cross_entropy_rows
from pretrain.stream.objectives import IGNORE
from pretrain.tasks.task import HeadTask, Inputs, ending, read_rows, tell_alike, whole_length, whole_text

OUTSIDE = "O"
_TAG = re.compile(r"O|[BI]-.+")


class TokenClassification(HeadTask):
    """One token of each word has the word's tag: the first one, or the last one in a model that looks back only, which
    has seen the whole word there alone. A text is its words with single spaces between them; what is longer than
    `seq_len` is cut, and counts as outside (O) of everything when it is judged.
    """

    head = "tokens"
    best, figures = "val_span_f1", ("span_f1", "span_precision", "span_recall")

    def __init__(self, config: TaskConfig, *others: Any):
        super().__init__(config, *others)
        self.numbers = {tag: number for number, tag in enumerate(self.labels)}
        check_tags(self.labels, "task.labels")

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        """The tags of a table: O, and the others sorted."""
        if config.labels is not None:
            return config
        _, read, _ = read_rows(table, _reader(config, table), config.drop_bad)
        found = {tag for _, tags in read for tag in tags} - {OUTSIDE}
        if not found:
            raise ValueError(f"{table.location} has only the tag {OUTSIDE}: there is nothing to find")
        tell_alike(found, table.location)
        return replace(config, labels=[OUTSIDE, *sorted(found)])

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        read = _reader(self.config, table, with_gold)

        def encoded(row: int) -> tuple[list[int], np.ndarray, np.ndarray]:
            words, tags = read(row)
            if unknown := [tag for tag in tags if tag not in self.numbers]:
                raise ValueError(f"the tag {unknown[0]!r} is none of {among(unknown[0], self.labels)}")
            ids, places, whole = self._encoded(words)
            labels = np.full(len(ids), IGNORE)
            for tag, place in zip(tags, places, strict=with_gold):
                if place >= 0:
                    labels[place] = self.numbers[tag]
            return ids, labels, places, whole

        rows, made, dropped = read_rows(table, encoded, self.config.drop_bad, with_gold)
        inputs, labels, places, whole = zip(*made, strict=True)
        columns = {"inputs": Ragged(inputs), "labels": Ragged(labels)}
        return make_examples(columns, rows, {"places": places}, dropped, whole)

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
        read, details = _reader(self.config, table), []
        predicted = [told["tags"] for told in self.outputs(table, examples, predictions)]
        for row, tags in zip(examples.rows.tolist(), predicted, strict=True):
            words, gold = read(row)
            details.append({"text": " ".join(words), "gold": gold, "prediction": tags, "right": tags == gold})
        return metrics.spans([row["gold"] for row in details], predicted), details, {}

    def _encoded(self, words: list[str]) -> tuple[list[int], np.ndarray, int]:
        """The ids of a text, the place of each word's token among them, int[words], -1 where there is none; and how
        many ids there were before the text was cut.
        """
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
        room = len(inputs) - len(ending(self.tokenizer, self.model))
        places[places >= room] = -1
        return inputs, places, whole_length(self.tokenizer, self.model, ids)


def _reader(
    config: TaskConfig, table: Table, with_gold: bool = True
) -> Callable[[int], tuple[list[str], list[str]]]:  # fmt: skip
    """What reads the words of a row, and their tags."""
    tokens = table.column(config.tokens, "task.tokens")
    gold = table.column(config.tags, "task.tags") if with_gold else None

    def read(row: int) -> tuple[list[str], list[str]]:
        words = _listed(tokens, row)
        if gold is None:
            return words, []
        tags = _listed(gold, row)
        if not words:
            raise ValueError("it has no words")
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words ({config.tokens}) and {len(tags)} tags ({config.tags})")
        check_tags(tags, config.tags)
        return words, tags

    return read


def check_tags(tags: list[str], name: str) -> None:
    """`ValueError` for what is no tag of BIO; `name`: where they stand."""
    if wrong := [tag for tag in tags if not _TAG.fullmatch(tag)]:
        if re.fullmatch("[ELSU]-.+", wrong[0]):
            raise ValueError(f"{name}: {wrong[0]!r} is of BIOES or BILOU, and BIO is read: write B- for S- and U-, and "
                             "I- for E- and L-")  # fmt: skip
        raise ValueError(f"{name}: {wrong[0]!r} is no tag of BIO: write B-{wrong[0]} for the first word of a span, "
                         f"I-{wrong[0]} for its others, and O for a word outside of all")  # fmt: skip


def _listed(column: Column, row: int) -> list[str]:
    """The words or tags of a row: a list, or a text that spaces divide."""
    value = column.value(row)
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(f"{column.name}={str(value)[:80]} must be a list of texts, or one text that spaces divide "
                         f"({column.key} names the column)")  # fmt: skip
    return found
