"""Vectors of texts that belong together: near to their partners and far from all others, for search and similarity."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from pretrain.config.schema import TaskConfig
from pretrain.evaluation import metrics
from pretrain.examples.stream import ExampleRows, Examples, Ragged, make_examples
from pretrain.examples.tables import Column, Table
from pretrain.tasks.contrast import (
    CELLS_AT_ONCE,
    SIDES,
    BatchContrast,
    Pairs,
    log_normalisers,
    pair_losses,
    pair_vectors,
)
from pretrain.tasks.task import Task, padded_tokens, read_rows, whole_length, whole_text


class Embedding(Task):
    """Learns from pairs of a query and the document that belongs to it.

    Held-out pairs: each query's document among all documents. Held-out pairs with a column `task.score`: Spearman's
    correlation of their cosines with it (as in STS-B; Cer et al., SemEval-2017).
    """

    head = "embedding"
    best = "val_mrr"
    figures = ("recall_at_1", "recall_at_10", "mrr", "ndcg_at_10")

    def __init__(self, config: TaskConfig, *others: Any):
        super().__init__(config, *others)
        self.loss_rows = BatchContrast(config.temperature)

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        if config.score in table.columns:
            raise ValueError(
                f"{table.location} has the column {config.score!r}: the pairs to learn from all belong together, only "
                "those of data.val may be scored. Leave out the column, or name another with task.score=..."
            )
        return config

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        """Without gold a table may have queries only."""
        config = self.config
        sides = [table.column(config.query, "task.query")]
        if with_gold or config.document in table.columns:
            sides.append(table.column(config.document, "task.document"))
        is_scored = with_gold and config.score in table.columns
        gold = table.column(config.score, "task.score") if is_scored else None

        def read(row: int) -> tuple[list[str], float | None]:
            texts = [side.text(row) for side in sides]
            if empty := [side.name for side, text in zip(sides, texts, strict=True) if with_gold and not text.strip()]:
                raise ValueError(f"{empty[0]!r} is empty")
            return texts, _number(gold, row) if gold else None

        rows, found, dropped = read_rows(table, read, config.drop_bad, with_gold)
        columns, numbers, whole = {}, {}, np.zeros(len(rows), np.int64)
        for end, texts in zip(SIDES, zip(*(texts for texts, _ in found), strict=True), strict=False):
            encoded = self.tokenizer.encode_batch(list(texts))
            whole += [whole_length(self.tokenizer, self.model, ids) for ids in encoded]
            made = (whole_text(self.tokenizer, self.model, ids, self.seq_len)[0] for ids in encoded)
            columns[f"inputs{end}"] = Ragged(made)
        same = ([numbers.setdefault(text, len(numbers)) for text in texts] for texts, _ in found)
        facts = {"scores": np.array([score for _, score in found])} if is_scored else {}
        return make_examples(columns | {"texts": Ragged(same, np.int64)}, rows, facts, dropped, whole)

    def weigh(self, examples: Examples) -> None:
        """`ValueError` where all pairs have one document."""
        if len(np.unique(examples.columns["texts"].values.reshape(-1, 2)[:, 1])) < 2:
            raise ValueError(f"data.train has one document ({self.config.document}) in all pairs: there is nothing to "
                             "tell apart")  # fmt: skip

    def best_on(self, examples: Examples) -> str:
        return "val_spearman" if "scores" in examples.facts else self.best

    def figures_of(self, examples: Examples) -> tuple[str, ...]:
        return ("spearman",) if "scores" in examples.facts else super().figures_of(examples)

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        """As `Task.collate`, and the same of the documents as inputs_document, documents_document; `texts` [B, 2]
        numbers the texts, equal ones equally. A pair is one target.
        """
        columns, numbers = rows.examples.columns, rows.numbers
        batch = {"labels": np.zeros(len(numbers), np.int64), "texts": columns["texts"].padded(numbers, 0)}
        for side in SIDES:
            if f"inputs{side}" in columns:
                batch[f"inputs{side}"], batch[f"documents{side}"] = padded_tokens(columns[f"inputs{side}"], numbers)
        return batch

    def score_rows(self, model: Any, **batch: torch.Tensor) -> torch.Tensor:
        """The predictions are the vectors; a loss between all held-out pairs is for `score` to compute."""
        vectors = pair_vectors(model, **batch).double().flatten(1)
        return torch.cat([vectors.new_zeros(len(vectors), 2), vectors], 1)

    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        """The cosine of each pair, or the vector of each query."""
        if "inputs_document" not in examples.columns:
            return [{"embedding": [round(value, 6) for value in vector]} for vector in predictions.tolist()]
        return [{"similarity": round(value, 6)} for value in _pairs(examples, predictions).similarities().tolist()]

    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        """`loss` is that of a batch of all held-out pairs: the more they are, the greater it is."""
        config, pairs = self.config, _pairs(examples, predictions)
        rows = [table.rows[row] for row in examples.rows]
        queries, documents = ([row[name] for row in rows] for name in (config.query, config.document))
        if "scores" in examples.facts:
            gold, found = examples.facts["scores"].tolist(), pairs.similarities().tolist()
            names = ("query", "document", "gold", "prediction")
            details = [dict(zip(names, row, strict=True)) for row in zip(queries, documents, gold, found, strict=True)]
            return {"spearman": metrics.spearman(gold, found)}, details, {}
        losses = pair_losses(pairs, log_normalisers(pairs, pairs, config.temperature), config.temperature)
        ranks, nearest = ranked(pairs)
        details = [
            {"query": query, "gold": document, "prediction": documents[first], "rank": rank, "right": rank == 1}
            for query, document, rank, first in zip(queries, documents, ranks.tolist(), nearest.tolist(), strict=True)
        ]
        facts = {"documents": len(set(documents))}
        return {"loss": float(losses.double().mean())} | metrics.ranking(ranks), details, facts


def ranked(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair the rank, from 1 on, of its document among all different documents, and the pair whose document is
    the nearest to its query.

    Other documents that belong to the same query are left out; one that is as near as the right one stands before it,
    so that equal vectors (or no numbers at all) are no success.
    """
    numbers, first, right = np.unique(pairs.texts[:, 1].numpy(), return_index=True, return_inverse=True)
    right = torch.from_numpy(right)
    belong = defaultdict(list)
    for query, document in zip(pairs.texts[:, 0].tolist(), right.tolist(), strict=True):
        belong[query].append(document)
    queries, documents = pairs.vectors[:, 0], pairs.vectors[first, 1]
    ranks, nearest = [], []
    for rows in torch.arange(len(right)).split(max(1, CELLS_AT_ONCE // len(numbers))):
        scores, own_at = queries[rows] @ documents.T, (torch.arange(len(rows)), right[rows])
        own = scores[own_at]
        for line, query in zip(scores, pairs.texts[rows, 0].tolist(), strict=True):
            line[belong[query]] = -torch.inf
        scores[own_at] = own
        ranks.append((~(scores < own[:, None])).sum(1))
        nearest.append(scores.argmax(1))
    return torch.cat(ranks).numpy(), first[torch.cat(nearest).numpy()]


def _pairs(examples: Examples, predictions: np.ndarray) -> Pairs:
    vectors = torch.from_numpy(predictions).float().view(len(examples), 2, -1)
    return Pairs(vectors, torch.from_numpy(examples.columns["texts"].values).view(-1, 2))


def _number(column: Column, row: int) -> float:
    try:
        number = float(value := column.value(row))
    except (TypeError, ValueError):
        raise ValueError(f"{column.name}={value!r} is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{column.name}={value} is not finite")
    return number
