"""Loading: the choice on resume, any saved range into any fragment, the weights of a run for whoever reads them.

Any ZeRO stage at any number of ranks loads any checkpoint: a rank fills the fragments it owns from whichever saved ones
overlap them.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pretrain.checkpoint.manifest import (
    MANIFEST,
    NO_OPTIMIZER,
    Header,
    Reader,
    committed,
    step_folder,
)
from pretrain.config.schema import ADDED_TO_MODELS, ModelConfig
from pretrain.dist import ALONE, Ranks, agree, all_gather_objects
from pretrain.engine.fragments import WEIGHT, Fragment
from pretrain.files import RESULT
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.lora import adapted, merged, without_lora

BAD = "bad-"


def choose(folder: Path, ranks: Ranks, on_event: Callable[..., None]) -> Reader | None:
    """The newest checkpoint that verifies, the ranks sharing the reading. One that does not is renamed and reported."""
    opened: list[Reader] = []
    for candidate in map(Path, all_gather_objects([str(path) for path in committed(folder)])[0]):
        error = agree(lambda path=candidate: opened.append(verified(path, ranks)))
        if not error:
            return opened[-1]
        if ranks.is_main:
            bad = candidate.with_name(f"{BAD}{candidate.name}-{int(time.time())}")
            os.rename(candidate, bad)
            on_event("checkpoint_rejected", checkpoint=candidate.name, renamed_to=bad.name, reason=error)
    return None


def verified(checkpoint: Path, ranks: Ranks) -> Reader:
    """A checkpoint of which this rank has verified its share."""
    reader = Reader(checkpoint)
    reader.verify(ranks)
    return reader


def read_header(checkpoint: Path) -> Header:
    return Reader(checkpoint).header


def fill(checkpoint: Reader, fragments: Iterable[Fragment]) -> Header:
    """Fill the fragments from the overlapping saved ones, read lazily. `Layout.refresh` must follow."""
    path, shapes = checkpoint.checkpoint, checkpoint.manifest["parameters"]
    for fragment in fragments:
        if fragment.kind != WEIGHT and checkpoint.header.optimizer == NO_OPTIMIZER:
            raise ValueError(f"{path} holds weights only, training cannot go on from it: start a new run with "
                             f"init={run_of(path)} instead")  # fmt: skip
        shape = shapes.get(fragment.name)
        if shape != list(fragment.shape):
            raise ValueError(f"{path}: {fragment.name} has shape {shape}, the model {list(fragment.shape)}")
        checkpoint.fill(fragment.name, fragment.kind, fragment.offset, fragment.values)
    checkpoint.close()
    return checkpoint.header


def run_of(run_or_checkpoint: Path) -> Path:
    """The run's folder of a run or of one of its checkpoints."""
    path = Path(run_or_checkpoint)
    return Path(os.path.abspath(path)).parent.parent if (path / MANIFEST).exists() else path


def checkpoint_of(run_or_checkpoint: Path) -> Path:
    """The checkpoint that a run is used with: the best one where its result.json names one, else the newest. Of a
    checkpoint, itself.
    """
    path = Path(run_or_checkpoint)
    found = [path] if (path / MANIFEST).exists() else committed(path / "checkpoints")
    if not found:
        inside = [str(each.parent) for name in ("checkpoints", "config.json") for each in path.glob(f"*/{name}")]
        meant = f"; did you mean {' or '.join(sorted(inside)[:3])}?" if inside else ""
        raise ValueError(f"no checkpoint in {path}: give a run's folder (runs/NAME) that has saved one{meant}")
    result = path / RESULT
    best = (
        step_folder(path / "checkpoints", json.loads(result.read_text(encoding="utf-8"))["step"])
        if result.is_file()
        else None
    )
    return best if best in found else found[0]


class Weights:
    """The fp32 weights of a checkpoint, or of a run, whole or in parts, read when they are asked for.

    Of a model with LoRA they are those of the plain model that it amounts to.
    """

    def __init__(self, run_or_checkpoint: Path):
        self.checkpoint = checkpoint_of(run_or_checkpoint)
        self._reader = Reader(self.checkpoint)
        self.header = self._reader.header
        model = ADDED_TO_MODELS | self.header.model
        if differing := set(model) ^ set(ModelConfig.__dataclass_fields__):
            raise ValueError(f"{self.checkpoint} is of another version, whose models have other settings than this "
                             f"one's: {', '.join(sorted(differing))}")  # fmt: skip
        self._saved_config = ModelConfig(**model)
        self._saved_shapes = parameter_shapes(self._saved_config)
        self.config = without_lora(self._saved_config)
        self.shapes = parameter_shapes(self.config)
        saved = {name: tuple(shape) for name, shape in self._reader.manifest["parameters"].items()}
        both = {**self._saved_shapes, **saved}
        if wrong := [name for name in both if saved.get(name) != self._saved_shapes.get(name)]:
            shapes = self._saved_shapes
            listed = "; ".join(f"{name} has {saved.get(name)}, not {shapes.get(name)}" for name in wrong[:4])
            raise ValueError(f"{self.checkpoint}: {len(wrong)} shapes differing from its model's config: {listed}")

    def verify(self, ranks: Ranks = ALONE, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """Raise `ValueError` where a file is missing, short or changed (`Reader.verify`)."""
        self._reader.verify(ranks, on_bytes)

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter."""
        return merged(self._saved_config, name, self._read_saved)

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """[offset, offset + numel) of the flat parameter; without LoRA, nothing else of it is read."""
        if adapted(self._saved_config):
            return self.read(name).view(-1)[offset : offset + numel]
        return self._read_part(name, offset, numel)

    def _read_saved(self, name: str) -> torch.Tensor:
        shape = self._saved_shapes[name]
        return self._read_part(name, 0, torch.Size(shape).numel()).view(shape)

    def _read_part(self, name: str, offset: int, numel: int) -> torch.Tensor:
        values = torch.empty(numel, dtype=torch.float32)
        self._reader.fill(name, WEIGHT, offset, values)
        return values


def load_model(run_or_checkpoint: Path) -> torch.nn.Module:
    """The model of a checkpoint, or of a run's newest one, in fp32 on the CPU, ready to evaluate."""
    weights = Weights(run_or_checkpoint)
    weights.verify()
    return filled_model(weights.config, weights.read)


def filled_model(model: ModelConfig, read: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """A model with `read(name)` for each parameter, in fp32 on the CPU, ready to evaluate."""
    filled = build_model(model).eval().requires_grad_(False)
    for name, parameter in filled.named_parameters():
        parameter.copy_(read(name))
    return filled
