"""What a fine-tuning task is: examples out of tables, batches, a loss, predictions, figures. Each has its own file.

Shapes: B batch, T time, C labels.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pretrain import dist
from pretrain.config.schema import ModelConfig, ObjectiveConfig, TaskConfig
from pretrain.examples.stream import ExampleRows, Examples, Ragged
from pretrain.examples.tables import Table
from pretrain.stream.objectives import IGNORE
from pretrain.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
Inputs = dict[str, torch.Tensor]
Write = Callable[[list[list[int]], int, Sequence[int]], list[list[int]]]  # (prompts, most new ids, ids that end them)

Written = dict[tuple[int, ...], list[int]]  # prompt -> the ids after it


class Task(ABC):
    """`head` is the model's, `labels` name its outputs; `best` is the figure that says which checkpoint is best, of the
    `figures` that an evaluation gives besides the loss (`best_on`, `figures_of`: where they depend on the examples).
    """

    head: str
    best: str
    figures: tuple[str, ...]
    loss_rows: Callable[..., torch.Tensor]  # for training: the summed loss of each row [B]

    def __init__(
        self, config: TaskConfig, tokenizer: Tokenizer, model: ModelConfig, seq_len: int, packing: str, seed: int,
        objective: ObjectiveConfig,
    ):  # fmt: skip
        """`config.labels` is filled in where the task has labels; `seq_len`: the most tokens of an example; `packing`:
        best_fit or none, for tasks that put several examples in a row; `objective`: for tasks whose labels are tokens.
        """
        self.config, self.tokenizer, self.model, self.seq_len = config, tokenizer, model, seq_len
        self.packing, self.seed, self.objective = packing, seed, objective
        self.labels: list[str] = config.labels or []

    def check_room(self, texts: int = 1) -> None:
        """`ValueError` where a row has no room for its special tokens and a token of each of its texts."""
        special = len(self.tokenizer.prefix) + len(ending(self.tokenizer, self.model))
        special += len(self.tokenizer.between) * (texts - 1)
        if self.seq_len < special + texts:
            raise ValueError(f"train.seq_len={self.seq_len} has no room for {special} special tokens and {texts} of "
                             f"text: take {special + texts} or more")  # fmt: skip

    @staticmethod
    def settled(config: TaskConfig, table: Table) -> TaskConfig:
        """`config`, with what it leaves open (labels: null, ...) as the training `table` has it."""
        return config

    def described(self) -> dict:
        """What a run's task.json says: all that an export or a reader needs to know."""
        return {"name": self.config.name, "labels": self.labels, "multi_label": self.config.multi_label}

    @abstractmethod
    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        """The examples of a table; without gold, what is to be predicted may be missing, and every row gives some."""

    def weigh(self, examples: Examples) -> None:  # noqa: B027 (few have anything to take)
        """Take from the training examples what the loss depends on, where it does."""

    def best_on(self, examples: Examples) -> str:
        """The `best` figure, with val_ before its name, for these held-out examples."""
        return self.best

    def figures_of(self, examples: Examples) -> tuple[str, ...]:
        """The names, without val_, of all that an evaluation of these held-out examples gives."""
        return ("loss", *self.figures)

    @abstractmethod
    def outputs(self, table: Table, examples: Examples, predictions: np.ndarray) -> list[dict]:
        """What is told to the user, one for each row of the table, out of predictions [n, k] of its examples."""

    @abstractmethod
    def score(self, table: Table, examples: Examples, predictions: np.ndarray) -> tuple[dict, list[dict], dict]:
        """(figures without val_, a row for each row of the table with its gold and whether it is right, facts that no
        figure can say), out of predictions [n, k] of all examples.
        """

    def judge_written(self, table: Table, examples: Examples, write: Write) -> tuple[dict, list[dict]]:
        """Where a model writes texts: figures and rows, as `score` has them, of what it writes after prompts."""
        return {}, []

    def respond(
        self, model: nn.Module, table: Table, batch_size: int, on_rows: Callable[[int], object] = lambda count: None,
        written: Written | None = None,
    ) -> list[dict] | None:  # fmt: skip
        """Where a model writes texts: what is told to the user, one for each row; into `written` goes what it wrote.
        None: `outputs` tells it.
        """
        return None

    @abstractmethod
    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        """A batch: what `loss_rows` and `score_rows` take besides the model, its labels among it."""

    @abstractmethod
    def score_rows(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """For evaluation: of each row the summed loss, the number of its labels, and the predictions: [B, 2 + k]."""


class HeadTask(Task):
    """A task whose head says all of a batch at once: a loss and predictions out of its logits."""

    def logits(self, model: Any, inputs: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        """What the model says of a batch of `collate`, without its labels."""
        return model(inputs, **others)

    @abstractmethod
    def losses(self, logits: torch.Tensor, labels: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The summed loss of each row [B], over its labels other than -100."""

    @abstractmethod
    def predictions(self, logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """What `outputs` needs of each row: [B, k] numbers, k the same for every batch."""

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        """A batch: inputs int64[B, T] filled up on the right, documents int32[B, T] (0, padding -1), labels."""
        columns, numbers = rows.examples.columns, rows.numbers
        inputs, documents = padded_tokens(columns["inputs"], numbers)
        batch = {"inputs": inputs, "documents": documents}
        if "segments" in columns:
            batch["segments"] = columns["segments"].padded(numbers, 0)
        return batch | {"labels": columns["labels"].padded(numbers, IGNORE)}

    def loss_rows(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """For training: the summed loss of each row [B]."""
        return self.losses(self.logits(model, **inputs), labels, inputs)

    def score_rows(self, model: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        logits = self.logits(model, **inputs)
        losses, counts = self.losses(logits, labels, inputs), (labels != IGNORE).view(len(labels), -1).sum(1)
        predictions = self.predictions(logits, inputs).double()
        return torch.cat([losses.double()[:, None], counts.double()[:, None], predictions], 1)


def padded_tokens(column: Ragged, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a column, filled up on the right, int64[B, T], and what in them is real: int32[B, T] of 0, padding -1."""
    tokens = column.padded(numbers, 0)
    padding = np.arange(tokens.shape[1]) >= column.lengths[numbers, None]
    return tokens, -padding.astype(np.int32)


def read_rows(
    table: Table, read: Callable[[int], T], drop_bad: bool, with_gold: bool = True
) -> tuple[list[int], list[T], list[str]]:  # fmt: skip
    """Of a table the rows that can be used, what `read(row)` makes of each, and what is wrong with the others: the
    `ValueError` of `read`. They are left out, or all named in one error. Without gold every row is to be used.
    """
    rows, found, problems = [], [], []
    is_main = dist.from_environment().is_main
    for row in tqdm(range(len(table.rows)), desc="reading examples", unit=" rows", delay=1, disable=not is_main):
        try:
            found.append(read(row))
            rows.append(row)
        except ValueError as error:
            problems.append(f"{table.place(row)}: {error}")
    if problems and not (drop_bad and with_gold):
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        what, remedy = "read", "Mend them, or leave them out"
        if with_gold:
            what, remedy = "learnt from", f"{remedy} with task.drop_bad=true"
        raise ValueError(f"{len(problems)} examples of {table.location} cannot be {what}: {'; '.join(problems[:5])}"
                         f"{more}. {remedy}")  # fmt: skip
    if not rows:
        raise ValueError(f"{table.location} has no example left of {len(table.rows)} rows")
    return rows, found, problems


def encode_and_tell(task: Task, table: Table, tell: bool = True) -> Examples:
    """The examples of a table with gold; what was left out is said."""
    examples = task.encode(table)
    sizes = examples.sizes()
    if sizes["cut"] and tell:
        share = sizes["cut_tokens"] / (sizes["cut_tokens"] + int(examples.lengths.sum()))
        print(f"{table.location}: {sizes['cut']:,} of {len(examples):,} examples are cut to train.seq_len="
              f"{task.seq_len} ({share:.1%} of the tokens; the longest has {sizes['longest']:,})",
              file=sys.stderr, flush=True)  # fmt: skip
    if examples.dropped and tell:
        print(f"{table.location}: {len(examples.dropped)} of {len(table.rows)} examples are left out, the first: "
              f"{examples.dropped[0]}", file=sys.stderr, flush=True)  # fmt: skip
    return examples


def tell_alike(names: Iterable[str], location: str) -> None:
    """Say which labels differ by spaces or case only: two classes, where mostly one is meant."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    found = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if found and dist.from_environment().is_main:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        print(f"note: {location}: the labels {'; '.join(found[:3])}{more} differ by spaces or case only, and are "
              "classes of their own", file=sys.stderr, flush=True)  # fmt: skip


def ending(tokenizer: Tokenizer, model: ModelConfig) -> list[int]:
    """The special ids after a text; none for a model that looks back only, for which the text is not over."""
    return [] if model.causal else tokenizer.suffix


def whole_length(
    tokenizer: Tokenizer, model: ModelConfig, ids: Sequence[int], pair: Sequence[int] | None = None
) -> int:
    """The ids of `whole_text` where nothing is cut."""
    special = len(tokenizer.prefix) + len(ending(tokenizer, model))
    return special + len(ids) + (0 if pair is None else len(tokenizer.between) + len(pair))


def whole_text(
    tokenizer: Tokenizer, model: ModelConfig, ids: list[int], limit: int, pair: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """A text, or two, with the special ids around, cut to `limit` ids, and the segment of each id (0 or 1).

    Of two texts the longer one is cut until it is as long as the other, then both, as transformers does.
    """
    before, after = tokenizer.prefix, ending(tokenizer, model)
    between = [] if pair is None else tokenizer.between
    room = limit - len(before) - len(between) - len(after)
    if pair is None:
        return [*before, *ids[:room], *after], [0] * (len(before) + min(room, len(ids)) + len(after))
    first, second = len(ids), len(pair)
    if first + second > room:
        shorter = min(first, second, room // 2)
        first, second = (shorter, room - shorter) if first <= second else (room - shorter, shorter)
    inside = [*before, *ids[:first], *between]
    rest = [*pair[:second], *after]
    return [*inside, *rest], [0] * len(inside) + [1] * len(rest)
