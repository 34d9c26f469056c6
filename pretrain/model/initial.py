"""The values that parameters start from, by name, with their sources."""

import hashlib
import math

import torch

from pretrain.config.schema import ModelConfig

TABLES = ("trunk.embedding", "trunk.positions", "trunk.segments", "trunk.values")
BLOCK = 1 << 16  # elements: those in a cache are drawn as fast as any, and what is drawn for nothing costs little


def fill_initial(
    values: torch.Tensor, offset: int, name: str, shape: tuple[int, ...], config: ModelConfig, seed: int
) -> None:
    """Fill `values` (1-D, of any type and device) with the initial values of [offset, offset + numel) of the flat
    parameter `name`. Each is a function of (seed, name, position) alone, the same on every rank, ZeRO stage and device.

    Norms are 1, biases 0, all else is normal around 0, its standard deviation by `config.init`:

    - `normal`: `init_std` (Devlin et al., BERT, 2018).
    - `scaled`: `init_std`, and 1/sqrt(2 layers) of it for matrices that write into the residual stream (Radford et al.,
      GPT-2, 2019).
    - `zero_residual`: `init_std`, and 0 for those: each block begins as the identity (Goyal et al., 2017, section 5.1;
      Zhang et al., Fixup, 2019).
    - `fan_in`: as `zero_residual`, but matrices of the blocks 1/sqrt(inputs) and the output matrix 0, so that what they
      make is as large at every width (Yang et al., "Tensor Programs V", 2022).
    - `xavier`: sqrt(2 / (inputs + outputs)) (Glorot and Bengio, 2010), tables 1/sqrt(width), so that embeddings times
      sqrt(width) have variance 1 (Vaswani et al., 2017).

    Of LoRA's adapters, whatever `init` says, B is 0 and A uniform within +-1/sqrt(inputs) (Hu et al., 2021): training
    begins with the model as it was.
    """
    owner, _, kind = name.rpartition(".")
    if kind in ("bias", "lora_b") or owner.endswith("norm"):
        values.fill_(float(kind == "weight"))
        return
    # Blocks are drawn whole and by the host: torch draws few values otherwise than many, and devices differ.
    generator, block = torch.Generator(), torch.empty(BLOCK)
    end = offset + values.numel()
    for number in range(offset // BLOCK, -(-end // BLOCK)):
        # Of a seed this generator takes 32 bits: of the million blocks of a 70B model about a hundred have a twin.
        digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:4], "little"))
        if kind == "lora_a":
            block.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
        else:
            block.normal_(0.0, _std(owner, shape, config), generator=generator)
        first, start = max(offset, number * BLOCK), number * BLOCK
        last = min(end, start + BLOCK)
        values[first - offset : last - offset].copy_(block[first - start : last - start])


def _std(owner: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    if config.init == "xavier":
        return config.width**-0.5 if owner.startswith(TABLES) else math.sqrt(2 / sum(shape))
    writes = owner.endswith((".attention.out", ".ffn.down"))
    if config.init == "fan_in" and not owner.startswith(TABLES):
        return 0.0 if writes or owner == "head" else shape[1] ** -0.5
    if not writes:
        return config.init_std
    factors = {"normal": 1.0, "scaled": 1 / math.sqrt(2 * config.layers), "zero_residual": 0.0}
    return config.init_std * factors[config.init]
