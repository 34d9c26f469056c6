"""The values that parameters start from, by name, with their sources."""

import hashlib
import math

import torch

from pretrain.config.schema import ModelConfig

TABLES = (".embedding", ".positions", ".segments")


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial fp32 value of a parameter, a function of (seed, name) alone: the same on every rank and ZeRO stage.

    Norms are 1, biases 0, all else is normal around 0, its standard deviation by `config.init`:

    - `normal`: `init_std` (Devlin et al., BERT, 2018).
    - `scaled`: `init_std`, and 1/sqrt(2 layers) of it for matrices that write into the residual stream (Radford et al.,
      GPT-2, 2019).
    - `zero_residual`: `init_std`, and 0 for those: each block begins as the identity (Goyal et al., 2017, section 5.1;
      Zhang et al., Fixup, 2019).
    - `xavier`: sqrt(2 / (inputs + outputs)) (Glorot and Bengio, 2010), tables 1/sqrt(width), so that embeddings times
      sqrt(width) have variance 1 (Vaswani et al., 2017).

    Of LoRA's adapters, whatever `init` says, B is 0 and A uniform within +-1/sqrt(inputs) (Hu et al., 2021): training
    begins with the model as it was.
    """
    owner, _, kind = name.rpartition(".")
    if kind in ("bias", "lora_b"):
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if kind == "lora_a":
        return torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    return torch.empty(shape).normal_(0.0, _std(owner, shape, config), generator=generator)


def _std(owner: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    if config.init == "xavier":
        return config.width**-0.5 if owner.endswith(TABLES) else math.sqrt(2 / sum(shape))
    if not owner.endswith((".attention.out", ".ffn.down")):
        return config.init_std
    factors = {"normal": 1.0, "scaled": 1 / math.sqrt(2 * config.layers), "zero_residual": 0.0}
    return config.init_std * factors[config.init]
