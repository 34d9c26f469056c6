"""A model that was tuned for a task, applied to a table of new examples."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pretrain import dist, hardware
from pretrain.checkpoint.load import run_of
from pretrain.config import compose
from pretrain.config.schema import Config
from pretrain.examples.tables import Table
from pretrain.hub import convert
from pretrain.tasks import make_task
from pretrain.tasks.task import encode_and_tell
from pretrain.tasks.validation import TaskValidation, predict
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
        rows = predict(self.task, examples, batch_size, self._evaluate, dist.ALONE, self.device, on_rows)
        return self.task.outputs(table, examples, rows[:, 2:])

    def figures(self, table: Table, batch_size: int) -> dict[str, float]:
        """How good it is on a table that has what is to be predicted; rows that are left out are said."""
        return self.judged(table, batch_size)[0]

    def judged(self, table: Table, batch_size: int) -> tuple[dict[str, float], list[dict]]:
        """`figures`, and those of each label where the task has them."""
        examples = encode_and_tell(self.task, table)
        validation = TaskValidation(self.task, table, examples, batch_size)
        found = validation.run(self._evaluate, dist.ALONE, self.device)
        if self.task.config.class_weights != "none":
            found.pop("val_loss")  # it is not weighted here: the weights are those of the training examples
        figures = {name.removeprefix("val_"): value for name, value in found.items() if math.isfinite(value)}
        return figures, validation.facts.get("per_label", [])

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
