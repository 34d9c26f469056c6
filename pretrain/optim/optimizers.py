"""Parameter groups and the optimizer over them: which algorithm steps which parameter, and what it keeps of it."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from pretrain.config.schema import OptimConfig
from pretrain.optim.muon import Orthogonalizer

Named = Iterable[tuple[str, torch.nn.Parameter]]
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
    groups: dict[tuple[str, bool, float], list] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor and keeps its shape here
        decays, algorithm = len(shape) >= 2 and "positions" not in name, algorithm_of(config.name, name, shape)
        scale = lr_scale(name) * (config.adamw_lr_scale if algorithm != config.name else 1.0)
        if name == "trunk.embedding.weight":
            scale *= config.embedding_lr_scale
        groups.setdefault((algorithm, not decays, scale), []).append(parameter)
    return [
        {"params": groups[key], "algorithm": key[0], "weight_decay": 0.0 if key[1] else config.weight_decay,
         "lr_scale": key[2]}
        for key in sorted(groups)
    ]  # fmt: skip


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
