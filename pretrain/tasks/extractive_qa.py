"""Questions that a part of a context answers (Rajpurkar et al., SQuAD, 2016; with unanswerable ones, 2018).

A row of the model is a question and a window of the context; a long context has several, that share tokens. Where the
answer is not in a window, or there is none, both its ends stand at position 0 (Devlin et al., BERT, 2018).
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.config.schema import TaskConfig
from pretrain.evaluation import metrics
from pretrain.examples.formats import answers
from pretrain.examples.stream import ExampleRows, Examples, Ragged, make_examples
from pretrain.examples.tables import Table
from pretrain.model.losses import span_rows
from pretrain.stream.objectives import IGNORE
from pretrain.tasks.task import HeadTask, Inputs, ending, read_rows

NOWHERE = [0, 0]
Gold = tuple[list[str], list[int]]  # the answers, and the characters where they begin


class ExtractiveQA(HeadTask):
    """A probability of each token to begin the answer, and to end it: exact match and F1 of words."""

    head = "span"
    best, figures = "val_f1", ("f1", "exact_match")

    def __init__(self, config: TaskConfig, *others: Any):
        super().__init__(config, *others)
        self.after = ending(self.tokenizer, self.model)
        self.longest_question = self.seq_len // 4
        special = len(self.tokenizer.prefix) + len(self.tokenizer.between) + len(self.after)
        room = self.seq_len - special - self.longest_question
        if config.stride >= room:
            raise ValueError(f"two windows share task.stride={config.stride} tokens, and one beside a long question "
                             f"has {room} (train.seq_len={self.seq_len}): make task.stride smaller, or train.seq_len "
                             "larger")  # fmt: skip

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        """Whether a question may have no answer."""
        if config.unanswerable is not None:
            return config
        _, read, _ = read_rows(table, _reader(config, table), config.drop_bad)
        return replace(config, unanswerable=any(not texts for _, _, (texts, _) in read))

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        read, spans_of = _reader(self.config, table, with_gold), functools.cache(self.tokenizer.encode_spans)

        def windows(row: int) -> list[tuple]:
            question, context, found = read(row)
            ids, places = spans_of(context)
            made = self._windows(self.tokenizer.encode(question), ids, places, context, found)
            return [(places[start:end], *window) for (start, end), *window in made]

        numbers, found, dropped = read_rows(table, windows, self.config.drop_bad, with_gold)
        rows = np.repeat(numbers, [len(made) for made in found])
        spans, inputs, segments, context, labels = zip(*itertools.chain(*found), strict=True)
        columns = {"inputs": Ragged(inputs), "context": Ragged(context), "labels": Ragged(labels)}
        if self.model.segments > 1:
            columns["segments"] = Ragged(segments, np.int8)
        return make_examples(columns, rows, {"spans": spans}, dropped)

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        """With `context` int64[B, 2]: the positions where the context starts and ends in each row."""
        return super().collate(rows) | {"context": rows.examples.columns["context"].padded(rows.numbers, 0)}

    def logits(self, model: Any, inputs: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        """[B, T, 2]; padding has no part in the softmax: how far a row is filled up changes nothing."""
        others = {name: values for name, values in others.items() if name != "context"}
        logits = super().logits(model, inputs, **others)
        return logits.masked_fill(others["documents"][:, :, None] < 0, torch.finfo(logits.dtype).min)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return span_rows(logits, labels)

    def predictions(self, logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Of the likeliest span of the context that is not too long: log p, the tokens of the context that it starts
        and ends with; and log p that there is no answer: [B, 4].
        """
        scores_BT2 = logits.float().log_softmax(1)
        context, places_T = inputs["context"], torch.arange(logits.shape[1], device=logits.device)
        outside_BT = (places_T < context[:, :1]) | (places_T >= context[:, 1:])
        starts_BT, ends_BT = scores_BT2.masked_fill(outside_BT[:, :, None], -torch.inf).unbind(2)
        longest = self.config.max_answer_tokens
        ends_BT, further_BT = F.pad(ends_BT, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1).max(2)
        best_B, start_B = (starts_BT + ends_BT).max(1)
        start_B, further_B = start_B - context[:, 0], further_BT.gather(1, start_B[:, None])[:, 0]
        return torch.stack([best_B, start_B, start_B + further_B, scores_BT2[:, 0].sum(1)], 1)

    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        """Of each row the likeliest span in any of its windows, or "" when no answer is likelier in one of them."""
        rows, firsts = np.unique(examples.rows, return_index=True)
        made = []
        for row, first, end in zip(rows, firsts, [*firsts[1:], len(examples)], strict=True):
            window = first + predictions[first:end, 0].argmax()
            score, nowhere = predictions[window, 0], predictions[first:end, 3].min()
            if np.isneginf(score) or (self.config.unanswerable and nowhere > score):
                made.append({"answer": "", "score": round(float(np.exp(nowhere)), 6), "start": None})
                continue
            tokens = examples.facts["spans"][window][predictions[window, 1:3].astype(int)]
            text = table.rows[row][self.config.context][tokens[0, 0] : tokens[1, 1]]
            start = int(tokens[0, 0]) + len(text) - len(text.lstrip())
            made.append({"answer": text.strip(), "score": round(float(np.exp(score)), 6), "start": start})
        return made

    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        read, details = _reader(self.config, table), []
        for row, told in zip(np.unique(examples.rows), self.outputs(table, examples, predictions), strict=True):
            question, _, (gold, _) = read(row)
            right, _ = metrics.answer_scores(told["answer"], gold)
            details.append({"question": question, "gold": gold, "prediction": told["answer"],
                            "right": bool(right), "score": told["score"]})  # fmt: skip
        figures = metrics.answers([row["prediction"] for row in details], [row["gold"] for row in details])
        return figures, details, {}

    def _windows(
        self, question: list[int], ids: np.ndarray, spans: np.ndarray, context: str, gold: Gold | None
    ) -> list[tuple]:
        """Each window as ((start, end) in the tokens of the context, inputs, segments, context, labels); `ValueError`
        for gold that no window can be labelled by.
        """
        before = [*self.tokenizer.prefix, *question[: self.longest_question], *self.tokenizer.between]
        room = self.seq_len - len(before) - len(self.after)
        target = None if gold is None else _target(context, spans, *gold)
        made, is_found = [], False
        for start in range(0, max(len(ids) - self.config.stride, 1), room - self.config.stride):
            end, labels = min(start + room, len(ids)), NOWHERE if gold is not None else [IGNORE, IGNORE]
            if target and start <= target[0] and target[1] < end:
                labels, is_found = [len(before) + token - start for token in target], True
            inputs = [*before, *ids[start:end].tolist(), *self.after]
            segments = [0] * len(before) + [1] * (len(inputs) - len(before))
            made.append(((start, end), inputs, segments, [len(before), len(before) + end - start], labels))
        if target and not is_found:
            raise ValueError(f"its answer has {target[1] - target[0] + 1} tokens, and two windows share task.stride="
                             f"{self.config.stride}: no window holds all of it")  # fmt: skip
        return made


def _reader(config: TaskConfig, table: Table, with_gold: bool = True) -> Callable[[int], tuple[str, str, Gold | None]]:
    """What reads a row: its question, its context and the answers to it."""
    question, context = table.column(config.question, "task.question"), table.column(config.context, "task.context")
    gold = table.column(config.answers, "task.answers") if with_gold else None

    def read(row: int) -> tuple[str, str, Gold | None]:
        found = answers(gold.value(row), f"column {gold.name!r} ({gold.key})") if gold else None
        return question.text(row), context.text(row), found

    return read


def _target(context: str, spans: np.ndarray, texts: list[str], starts: list[int]) -> tuple[int, int] | None:
    """The tokens of a context, the first and the last, that cover the first answer; None: there is no answer."""
    for text, start in zip(texts, starts, strict=True):
        if not text.strip():
            raise ValueError("an answer is empty: a question that has none is written with an empty list of answers")
        if start < 0 or not context.startswith(text, start):
            at = context.find(text)
            there = f"it is at {at}" if at >= 0 else "it is nowhere in the context"
            raise ValueError(f"the answer {text!r} is not at answer_start={start} (in characters): {there}")
    if not texts:
        return None
    start = starts[0] + len(texts[0]) - len(texts[0].lstrip())
    end = start + len(texts[0].strip())
    tokens = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < end))
    if not len(tokens):
        raise ValueError(f"the answer {texts[0]!r} has no token: this tokenizer drops its characters")
    return int(tokens[0]), int(tokens[-1])
