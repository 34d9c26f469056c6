"""Parameter groups and the optimizer over them: which algorithm steps which parameter, and what it keeps of it."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from pretrain.config.schema import OptimConfig
from pretrain.optim.muon import Orthogonalizer

Named = Iterable[tuple[str, torch.nn.Parameter]]
EMBEDDING = "trunk.embedding.weight"
VALUES = "trunk.values."
TABLES = ("positions.weight", "segments.weight")
# The tensors that an algorithm keeps for a parameter, all of the parameter's size, besides its step count.
STATE_KINDS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}


def algorithm_of(optimizer: str, name: str, shape: tuple[int, ...]) -> str:
    """What steps a parameter. Muon is for the matrices of the blocks that learn in full: embeddings, position tables,
    heads, vectors and the thin matrices of LoRA are AdamW's.
    """
    is_matrix = len(shape) == 2 and name.startswith("trunk.blocks.") and ".lora_" not in name
    return optimizer if optimizer == "muon" and is_matrix else "adamw"


def build(config: OptimConfig, named: Named, lr_scale: Callable[[str], float] = lambda name: 1.0) -> Optimizer:
    """The optimizer that `config.name` says, of those parameters that learn."""
    return OPTIMIZERS[config.name](parameter_groups(config, named, lr_scale), config)


def parameter_groups(config: OptimConfig, named: Named, lr_scale: Callable[[str], float]) -> list[dict]:
    """Of those that learn, matrices decay; vectors (norms, biases) and position tables do not. `lr_scale` of each
    group multiplies the learning rate; `algorithm` is a key of `STATE_KINDS`.
    """
    groups: dict[tuple[str, float, float], list] = {}
    parameters = dict(named)
    shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
    ratio = config.base_width / shapes[EMBEDDING][1] if config.base_width else 1.0
    for name, shape in shapes.items():
        if not parameters[name].requires_grad:
            continue
        decays, algorithm = len(shape) >= 2 and "positions" not in name, algorithm_of(config.name, name, shape)
        scale = lr_scale(name) * (config.adamw_lr_scale if algorithm != config.name else 1.0)
        if name == EMBEDDING or name.startswith(VALUES):
            scale *= config.embedding_lr_scale
        by_width = of_width(ratio, name, shape, algorithm)
        decay = config.weight_decay / by_width if decays else 0.0  # what a step takes away is the same at every width
        groups.setdefault((algorithm, -decay, scale * by_width), []).append(parameters[name])
    return [
        {"params": groups[key], "algorithm": key[0], "weight_decay": abs(key[1]), "lr_scale": key[2]}
        for key in sorted(groups)
    ]


def of_width(ratio: float, name: str, shape: tuple[int, ...], algorithm: str) -> float:
    """What the learning rate of a matrix is multiplied by where a width times `ratio` is the one it was found at, so
    that outputs change as much by a step. As many inputs more add up all the updates of AdamW, which go the same way
    (Yang et al., "Tensor Programs V", 2022, table 8), and the root of it those of Muon, which are orthogonal. Tables
    and vectors, whose inputs do not become more, are left alone.
    """
    if len(shape) < 2 or name.endswith(TABLES) or name.startswith((EMBEDDING, VALUES)):
        return 1.0
    return ratio**0.5 if algorithm == "muon" else ratio


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the tensor and keeps its shape here


def _adamw(groups: list[dict], config: OptimConfig) -> Optimizer:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; fused is 3x the loop's speed on CPU."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _muon(groups: list[dict], config: OptimConfig) -> Optimizer:
    return Orthogonalizer(groups, config.lr, (config.beta1, config.beta2), config.eps, config.momentum)


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def init_state(optimizer: Optimizer, algorithm: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of one (flat) parameter, created now instead of at the first step, so that it can be loaded into."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in STATE_KINDS[algorithm]:
            state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state
