"""A fine-tuned run, applied to a table of new examples."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pretrain import checkpoint, compose, dist, hardware
from pretrain.data.tables import Table
from pretrain.data.tokenizer import load_tokenizer
from pretrain.tasks import make_task
from pretrain.tasks.validation import TaskValidation, predict


class Predictor:
    """A run's model and its task, loaded for one device."""

    def __init__(self, run: Path, precision: str = "auto", drop_bad: bool = False):
        """`run`: a fine-tuned run, or one of its checkpoints; `precision`: auto, bf16 or fp32."""
        folder = checkpoint.run_of(run)
        config = compose.read(folder / "config.yaml")
        if config.task is None:
            raise ValueError(f"{folder} was trained for no task: give a run of pretrain.finetune")
        self.device = dist.start(dist.ALONE)
        dtype = torch.bfloat16 if hardware.resolve_precision(precision, self.device) == "bf16" else torch.float32
        self.model = checkpoint.load_model(run).to(self.device, dtype)
        settings = replace(config.task, drop_bad=drop_bad)
        shape = checkpoint.Weights(run).config
        self.task = make_task(settings, load_tokenizer(folder), shape, config.train.seq_len, config.data.packing,
                              config.seed, objective=config.objective)  # fmt: skip

    def outputs(self, table: Table, batch_size: int, on_rows: Callable[[int], object]) -> list[dict]:
        """What the model says of each row of a table, which need not have what is to be predicted."""
        if self.task.respond:
            return self.task.respond(self.model, table, batch_size, on_rows)
        examples = self.task.encode(table, with_gold=False)
        rows = predict(self.task, examples, batch_size, self._evaluate, dist.ALONE, self.device, on_rows)
        return self.task.outputs(table, examples, rows[:, 2:])

    def figures(self, table: Table, batch_size: int) -> dict[str, float]:
        """How good it is on a table that has what is to be predicted."""
        examples = self.task.encode(table)
        found = TaskValidation(self.task, table, examples, batch_size).run(self._evaluate, dist.ALONE, self.device)
        return {name.removeprefix("val_"): value for name, value in found.items() if math.isfinite(value)}

    @torch.no_grad()
    def _evaluate(self, function: Callable[..., torch.Tensor], **batch: torch.Tensor) -> torch.Tensor:
        return function(self.model, **batch).double().cpu()
