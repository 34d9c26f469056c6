"""Small models that tests and their workers share, with weights that are the same in every process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pretrain.checkpoint import save
from pretrain.config import compose
from pretrain.config.schema import ModelConfig
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import WEIGHT
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.initial import fill_initial

SMALL = ["run.name=x", "model=llama_tiny", "model.vocab_size=97", "train.seq_len=32", "model.max_positions=48"]
LENGTHS = (3, 11, 1, 7, 7, 20)
Read = Callable[[str, tuple[int, ...]], torch.Tensor]


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial value of a whole parameter."""
    value = torch.empty(shape)
    fill_initial(value.view(-1), 0, name, shape, config, seed)
    return value


def initial_values(config: ModelConfig, scale: float = 1, seed: int = 0) -> Read:
    """A model's first weights; with a scale of 5 it is far from the uniform distribution, so that mistakes show."""
    return lambda name, shape: scale * initial_value(name, shape, config, seed)


def model_with(config: ModelConfig, read: Read, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that has `read(name, shape)` as its weights."""
    model = build_model(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = read(name, tuple(parameter.shape))
            assert value.shape == parameter.shape, name
            parameter.copy_(value)
    return model


def filled_model(config: ModelConfig, scale: float = 1, seed: int = 0) -> torch.nn.Module:
    return model_with(config, initial_values(config, scale, seed))


def write_weights(folder: Path, config: ModelConfig, scale: float = 1, seed: int = 0) -> None:
    """A run's folder with such a model's weights."""
    read, shapes = initial_values(config, scale, seed), parameter_shapes(config)
    save.write_weights(folder, config, lambda name: read(name, shapes[name]))


def fill_engine(built: Engine, read: Read) -> None:
    """The same for what a rank owns of a model under DeepSpeed."""
    for f in built.layout.fragments():
        if f.kind == WEIGHT:
            f.values.copy_(read(f.name, f.shape).reshape(-1)[f.offset : f.offset + len(f.values)])
    built.layout.refresh(0)


def tiny_model(*parts: str) -> torch.nn.Module:
    """A small language model for use, far from uniform."""
    return filled_model(compose.compose("pretrain", [*SMALL, *parts]).model, 5).eval().requires_grad_(False)


def some_prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 97, length).tolist() for length in LENGTHS]
