"""LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021): matrices that stay as they are and
learn a product of two thin ones, y = x W^T + (alpha / rank) x A^T B^T.

The product can be added to the matrix afterwards: what comes out is the plain model.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.config.schema import ModelConfig

ATTENTION, FFN = ("q", "k", "v", "out"), ("up", "gate", "down")


class LoRALinear(nn.Linear):
    """A matrix [outputs, inputs] with A [rank, inputs] and B [outputs, rank] beside it."""

    def __init__(self, inputs: int, outputs: int, bias: bool, config: ModelConfig):
        super().__init__(inputs, outputs, bias)
        self.scale = config.lora_alpha / config.lora_rank
        self.lora_a = nn.Parameter(self.weight.new_empty(config.lora_rank, inputs))
        self.lora_b = nn.Parameter(self.weight.new_empty(outputs, config.lora_rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def adapted(config: ModelConfig) -> tuple[str, ...]:
    """The matrices of a block that have adapters."""
    return () if not config.lora_rank else ATTENTION if config.lora_on == "attention" else ATTENTION + FFN


def linear(config: ModelConfig, name: str, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """The matrix `name` of a block."""
    return LoRALinear(inputs, outputs, bias, config) if name in adapted(config) else nn.Linear(inputs, outputs, bias)


def freeze(model: nn.Module, head: str) -> None:
    """Leave the adapters to be trained, and what a task puts on the trunk; a language model's head is no new one."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or head != "lm" and not name.startswith("trunk."))


def without_lora(config: ModelConfig) -> ModelConfig:
    """The plain model that `merged` gives the weights of."""
    return replace(config, lora_rank=0)


def merged(config: ModelConfig, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The parameter `name` of the plain model, `read(name)` those of the model `config`, in fp32."""
    weight, (owner, _, kind) = read(name), name.rpartition(".")
    if kind != "weight" or not owner.startswith("trunk.blocks.") or owner.split(".")[-1] not in adapted(config):
        return weight
    product = read(f"{owner}.lora_b") @ read(f"{owner}.lora_a")
    return weight + config.lora_alpha / config.lora_rank * product
