"""A model that was tuned for a task, applied to a table of new examples."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pretrain import dist, hardware
from pretrain.checkpoint.load import run_of
from pretrain.config import compose
from pretrain.config.schema import Config
from pretrain.examples.stream import Examples
from pretrain.examples.tables import Table
from pretrain.hub import convert
from pretrain.tasks import make_task
from pretrain.tasks.task import Written, encode_and_tell
from pretrain.tasks.validation import TaskValidation, continued, predict
from pretrain.tokenizer.tokenizer import load_tokenizer

THE_MODELS_OWN = ("name", "labels", "multi_label", "pooling")  # settings that belong to what the weights were tuned for


class Predictor:
    """A model and its task, loaded for one device."""

    def __init__(self, run: Path, precision: str = "auto", overrides: Sequence[str] = ()):
        """`run`: a fine-tuned run, one of its checkpoints, an imported model, or a Hugging Face folder; `precision`:
        auto, bf16 or fp32; `overrides`: settings of the task, as "task.text=body".
        """
        config, self.device = settings(run, overrides), dist.device_of()
        self.model = convert.load_model(run).to(self.device, hardware.dtype_for(precision, self.device))
        tokenizer, shape = load_tokenizer(run_of(run)), self.model.trunk.config
        self.task = make_task(config.task, tokenizer, shape, config.train.seq_len, config.data.packing, config.seed,
                              table=None, objective=config.objective)  # fmt: skip

    def outputs(self, table: Table, batch_size: int, on_rows: Callable[[int], object]) -> list[dict]:
        """What the model says of each row of a table, which need not have what is to be predicted."""
        told = self.task.respond(self.model, table, batch_size, on_rows)
        if told is not None:
            return told
        examples = self.task.encode(table, with_gold=False)
        return self.task.outputs(table, examples, self._predict(examples, batch_size, on_rows)[:, 2:])

    def told_and_judged(
        self, table: Table, batch_size: int, on_rows: Callable[[int], object]
    ) -> tuple[list[dict], dict[str, float], list[dict]]:
        """`outputs` and `judged`, out of one pass of the model; rows that cannot be judged are told on their own."""
        examples, written = encode_and_tell(self.task, table), {}
        validation = TaskValidation(self.task, table, examples, batch_size)
        told = self.task.respond(self.model, table, batch_size, on_rows, written)
        if told is not None:
            rows = self._predict(examples, batch_size)
        else:
            judged = np.unique(examples.rows) if examples.dropped else np.arange(len(table.rows))
            others = np.setdiff1d(np.arange(len(table.rows)), judged)
            told_others = self.outputs(table.only(others), batch_size, on_rows) if len(others) else []
            rows = self._predict(examples, batch_size, on_rows)
            renumbered = replace(examples, rows=np.searchsorted(judged, examples.rows))
            told_judged = self.task.outputs(table.only(judged), renumbered, rows[:, 2:])
            order = np.argsort(np.concatenate([judged, others]))
            told = [(told_judged + told_others)[number] for number in order]
        found = validation.judge(rows, functools.partial(self._write, written, batch_size))
        return told, *self._named(found, validation)

    def figures(self, table: Table, batch_size: int) -> dict[str, float]:
        """How good it is on a table that has what is to be predicted; rows that are left out are said."""
        return self.judged(table, batch_size)[0]

    def judged(self, table: Table, batch_size: int) -> tuple[dict[str, float], list[dict]]:
        """`figures`, and those of each label where the task has them."""
        examples = encode_and_tell(self.task, table)
        validation = TaskValidation(self.task, table, examples, batch_size)
        return self._named(validation.run(self._evaluate, dist.ALONE, self.device), validation)

    def _named(self, found: dict[str, float], validation: TaskValidation) -> tuple[dict[str, float], list[dict]]:
        if self.task.config.class_weights != "none":
            found.pop("val_loss")  # it is not weighted here: the weights are those of the training examples
        figures = {name.removeprefix("val_"): value for name, value in found.items() if math.isfinite(value)}
        return figures, validation.facts.get("per_label", [])

    def _predict(
        self, examples: Examples, batch_size: int, on_rows: Callable[[int], object] = lambda count: None
    ) -> np.ndarray:
        return predict(self.task, examples, batch_size, self._evaluate, dist.ALONE, self.device, on_rows)

    def _write(
        self, written: Written, batch_size: int, prompts: list[list[int]], max_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """As `continued`, but for what was written before."""
        if new := [prompt for prompt in prompts if tuple(prompt) not in written]:
            found = continued(batch_size, self._evaluate, dist.ALONE, new, max_tokens, stop_ids)
            written = written | dict(zip(map(tuple, new), found, strict=True))
        return [written[tuple(prompt)] for prompt in prompts]

    @torch.no_grad()
    def _evaluate(self, function: Callable[..., torch.Tensor], **batch: torch.Tensor) -> torch.Tensor:
        return function(self.model, **batch).double().cpu()


def longest(run: Path, described: dict) -> int:
    """The most tokens of a text, of a model without a run's configuration."""
    return described.get("seq_len") or convert.open_model(run).config.max_positions


def settings(run: Path, overrides: Sequence[str]) -> Config:
    """The configuration that a run was tuned with; of another model the default one, for the task, the labels and the
    length that it brings. `overrides` change the settings of its task; what it writes is judged on all rows.
    """
    described, folder = convert.task_of(run), run_of(run)
    if not described:
        raise ValueError(f"{run} was tuned for no task: give a run of pretrain.finetune, or a model that was imported "
                         "with a head for one")  # fmt: skip
    keys = [override.partition("=")[0].partition("task.")[2] for override in overrides]
    if wrong := [override for key, override in zip(keys, overrides, strict=True) if not key or key in THE_MODELS_OWN]:
        raise ValueError(f"{wrong[0]}: only settings of how its task is put can be given, as task.text=COLUMN")
    name = described["name"]
    config = compose.compose("finetune", [f"task={name}", "run.name=x", "data.train=x", *overrides])
    given = {key: getattr(config.task, key) for key in keys}
    if (folder / "config.yaml").is_file():
        config = compose.read(folder / "config.yaml")
        task = replace(config.task, drop_bad=False)
    else:
        task = replace(config.task, labels=described["labels"], multi_label=described["multi_label"])
        config = replace(config, train=replace(config.train, seq_len=longest(run, described)))
    return replace(config, task=replace(task, **{"generate_samples": sys.maxsize} | given))
