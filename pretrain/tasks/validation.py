"""A task's held-out examples, judged by all ranks together: the figures are the same for every number of them."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pretrain.dist import Ranks, all_gather_tensor, all_reduce_sum
from pretrain.evaluation.validation import Evaluate
from pretrain.examples.stream import ExampleRows, Examples
from pretrain.examples.tables import Table
from pretrain.inference.generate import generate_batch
from pretrain.tasks.task import Task, Write


class TaskValidation:
    """Evaluates a task on the examples of a table; see `evaluation.validation.Evaluation`."""

    def __init__(self, task: Task, table: Table, examples: Examples, micro_batch_size: int):
        self.task, self.table, self.examples, self.micro_batch_size = task, table, examples, micro_batch_size
        self.details: list[dict] = []
        self.facts: dict = {}

    def run(self, evaluate: Evaluate, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """The figures, called `val_...`; of the loss only where the examples have labels to lose."""
        with progress("evaluating", len(self.examples), " examples", ranks) as on_rows:
            rows = predict(self.task, self.examples, self.micro_batch_size, evaluate, ranks, device, on_rows)
        return self.judge(rows, functools.partial(continued, self.micro_batch_size, evaluate, ranks))

    def judge(self, rows: np.ndarray, write: Write) -> dict[str, float]:
        """The figures of what `predict` says of the examples, [n, 2 + k], and of what the model writes."""
        losses, counts = math.fsum(rows[:, 0].tolist()), int(rows[:, 1].sum())
        figures, self.details, self.facts = self.task.score(self.table, self.examples, rows[:, 2:])
        written, told = self.task.judge_written(self.table, self.examples, write)
        self.details = told or self.details
        self.facts = self.facts | self.examples.sizes()
        named = {f"val_{name}": float(value) for name, value in (figures | written).items()}
        return ({"val_loss": losses / counts} if counts else {}) | named


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, ranks: Ranks) -> Iterator[Callable[[int], object]]:
    """A bar for what all ranks do together; it is told of this rank's rows, and goes when all is done. In a log file it
    stands every 10 seconds.
    """
    every = 0.1 if sys.stderr.isatty() else 10
    with tqdm(
        total=total, desc=what, unit=unit, delay=2, mininterval=every, leave=False, disable=not ranks.is_main
    ) as bar:
        yield lambda count: bar.update(min(count * ranks.world_size, total - bar.n))


def predict(
    task: Task, examples: Examples, micro_batch_size: int, evaluate: Evaluate, ranks: Ranks, device: torch.device,
    on_rows: Callable[[int], object] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """What `task.score_rows` says of all examples, in their order: fp64[n, 2 + k], on all ranks.

    Batches are of examples of like lengths. Every rank computes equally often, as ZeRO-3 needs.
    """
    count = len(examples)
    by_length = np.argsort(-examples.lengths, kind="stable")
    each = -(-count // ranks.world_size)
    mine = by_length[np.minimum(np.arange(each) * ranks.world_size + ranks.rank, count - 1)]
    parts = []
    for start in range(0, each, micro_batch_size):
        numbers = mine[start : start + micro_batch_size]
        batch = task.collate(ExampleRows(numbers, numbers, examples))
        tensors = {name: torch.from_numpy(column).to(device) for name, column in batch.items()}
        parts.append(evaluate(task.score_rows, **tensors))
        on_rows(len(numbers))
    gathered = all_gather_tensor(torch.cat(parts)).transpose(0, 1).flatten(0, 1)[:count].numpy()
    in_order = np.empty_like(gathered)
    in_order[by_length] = gathered
    return in_order


def continued(
    micro_batch_size: int, evaluate: Evaluate, ranks: Ranks, prompts: list[list[int]], max_tokens: int,
    stop_ids: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """The likeliest ids after each prompt, on all ranks: each writes those of prompts r::w, and calls the model as
    often as the others.
    """

    def write(model: nn.Module, mine: list[list[int]]) -> torch.Tensor:
        found = generate_batch(model, mine, max_tokens, stop_ids=stop_ids, all_done=_all_done)
        return torch.tensor([[len(ids), *ids, *[0] * (max_tokens - len(ids))] for ids in found])

    each = -(-len(prompts) // ranks.world_size)
    mine = [prompts[min(i * ranks.world_size + ranks.rank, len(prompts) - 1)] for i in range(each)]
    batches = (mine[start : start + micro_batch_size] for start in range(0, each, micro_batch_size))
    parts = []
    with progress("writing", len(prompts), " responses", ranks) as on_rows:
        for batch in batches:
            parts.append(evaluate(functools.partial(write, mine=batch)))
            on_rows(len(batch))
    gathered = all_gather_tensor(torch.cat(parts)).transpose(0, 1).flatten(0, 1)[: len(prompts)]
    return [row[1 : 1 + row[0]] for row in gathered.long().tolist()]


def _all_done(is_done: bool) -> bool:
    """Whether all ranks are."""
    return int(all_reduce_sum(torch.tensor(int(not is_done)))) == 0
