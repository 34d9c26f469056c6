"""Validation loss, and bits per byte or accuracy, the same for every number of ranks."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pretrain.config.held_out import LESS_IS_BETTER, column, parted
from pretrain.dist import Ranks, all_gather_tensor
from pretrain.files import PREDICTIONS, RESULT, write_atomically
from pretrain.model.losses import loss_rows, score_rows
from pretrain.stream.objectives import IGNORE, MaskedLM, batch_of
from pretrain.stream.stream import Stream

Evaluate = Callable[..., torch.Tensor]


class Evaluation(Protocol):
    """What the loop does with held-out data. `details`: what it said of each example, `facts`: what a figure cannot say
    (a confusion table), both of the last time.
    """

    details: list[dict]
    facts: dict

    def run(self, evaluate: Evaluate, ranks: Ranks, device: torch.device) -> dict[str, float]:
        """The figures, called `val_...`; on all ranks. `evaluate(function, **batch)` gives what `function(model,
        **batch)` says, fp64 on the CPU.
        """


class Several:
    """Held-out sets by their names, each judged as it would be alone; the figures of `news` are called val_news/..."""

    def __init__(self, sets: Mapping[str, Evaluation]):
        self.sets = sets

    def run(self, evaluate: Evaluate, ranks: Ranks, device: torch.device) -> dict[str, float]:
        figures = {}
        for name, evaluation in self.sets.items():
            found = evaluation.run(evaluate, ranks, device)
            figures |= {column(name, parted(figure)[1]): value for figure, value in found.items()}
        return figures

    @property
    def details(self) -> list[dict]:
        """Those of all sets; of several, each with the name of its set."""
        tag = len(self.sets) > 1
        return [{"set": name} | row if tag else row for name, each in self.sets.items() for row in each.details]

    @property
    def facts(self) -> dict:
        """Those of the one set, or of several {"sets": {name: facts}}."""
        found = {name: each.facts for name, each in self.sets.items()}
        return {"sets": found} if len(found) > 1 else next(iter(found.values()))


def together(sets: Mapping[str, Evaluation]) -> Evaluation | None:
    """One evaluation of all sets; None where there are none. The one set without a name, "", has figures without it."""
    return sets.get("") or (Several(sets) if sets else None)


class Best:
    """The best evaluation of a run so far, by one of its figures: a function of the run's journal.

    It is kept in the run's result.json, and what it said of each example in predictions.jsonl.
    """

    def __init__(self, metric: str, patience: int, journal: Iterable[dict], folder: Path | None):
        """`patience`: after how many evaluations without a better one a run is over; 0: never. `folder`: the run's, on
        the rank that writes.
        """
        self.metric, self._patience, self._folder = metric, patience, folder
        self.row: dict = {}
        self._since = 0
        for row in journal:
            self._note(row)
        if folder is not None:
            self._forget_what_was_undone()

    @property
    def step(self) -> int | None:
        return self.row.get("step")

    def offer(self, row: dict, evaluation: Evaluation) -> bool:
        """Take note of an evaluation; whether it is the best one."""
        if is_best := self._note(row):
            self._write(evaluation)
        return is_best

    def told(self) -> str:
        """The best evaluation, in a line."""
        figures = {name: value for name, value in self.row.items() if name.startswith("val_") and value is not None}
        listed = ", ".join(f"{_spoken(name)} {value:.4f}" for name, value in figures.items())
        return f"best {_spoken(self.metric)} at step {self.step} ({listed})"

    @property
    def is_over(self) -> str | None:
        """Why the run should end now, or None."""
        if not self._patience or self._since < self._patience:
            return None
        return f"no better {self.metric} in {self._since} evaluations"

    def _note(self, row: dict) -> bool:
        sign = -1 if parted(self.metric)[1] in LESS_IS_BETTER else 1
        value, before = row.get(self.metric), self.row.get(self.metric)
        is_best = value is not None and math.isfinite(value) and (before is None or sign * value > sign * before)
        self._since = 0 if is_best else self._since + 1
        if is_best:
            self.row = row
        return is_best

    def _write(self, evaluation: Evaluation) -> None:
        if self._folder is None:
            return
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.details)
        write_atomically(self._folder / PREDICTIONS, "".join(lines).encode())
        self._write_result(evaluation.facts)

    def _write_result(self, facts: dict) -> None:
        figures = {name: value for name, value in self.row.items() if name.startswith("val_")}
        result = {"metric": self.metric, "best": self.row[self.metric], "step": self.step, "figures": figures}
        write_atomically(self._folder / RESULT, json.dumps(result | facts, indent=1).encode())

    def _forget_what_was_undone(self) -> None:
        """A run that goes back to a checkpoint before its best evaluation has another best one, or none."""
        path = self._folder / RESULT
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["step"] == self.step:
            return
        for stale in (path, self._folder / PREDICTIONS):
            stale.unlink(missing_ok=True)
        if self.step is not None:
            self._write_result({})


def _spoken(metric: str) -> str:
    return " ".join(filter(None, parted(metric)))


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
        """`evaluate(score_rows, **batch)` gives what `losses.loss_rows` or `score_rows` says of the model and a `batch`
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
            labels = batch["labels"]
            labels[mine >= count] = IGNORE  # padding: every rank computes equally often, as ZeRO-3 needs
            facts = torch.from_numpy(np.stack([(labels != IGNORE).sum(1), self._text_bytes(labels)], 1))
            tensors = {name: torch.from_numpy(part).to(device) for name, part in batch.items()}
            scores = evaluate(self.score_rows, **tensors)
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
