"""Optimizers over parameter groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable

import torch

from pretrain.config.schema import OptimConfig, ScheduleConfig

# The tensors each optimizer keeps for a parameter, all of the parameter's size, besides its step count.
STATE_KINDS = {"adamw": ("exp_avg", "exp_avg_sq")}


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict]:  # fmt: skip
    """Of those that learn, matrices decay; vectors (norms, biases) and position tables do not. `lr_scale` of each
    group multiplies the learning rate.
    """
    groups: dict[tuple[bool, float], list] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor and keeps its shape here
        decays = len(shape) >= 2 and "positions" not in name
        groups.setdefault((not decays, lr_scale(name)), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay, "lr_scale": key[1]}
        for key in sorted(groups)
    ]


def _adamw(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; fused is 3x the loop's speed on CPU."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


OPTIMIZERS = {"adamw": _adamw}


def build(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer that `config.name` says."""
    return OPTIMIZERS[config.name](groups, config)


def init_state(optimizer: torch.optim.Optimizer, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of one (flat) parameter, created now instead of at the first step, so that it can be loaded into."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in STATE_KINDS[name]:
            state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state


def _cosine(progress: float, config: ScheduleConfig) -> float:
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: ScheduleConfig) -> float:
    return 1 - (1 - config.min_lr_ratio) * progress


def _wsd(progress: float, config: ScheduleConfig) -> float:
    """Warm-up, stable, decay: constant, then linear over the last `decay_fraction` (Hu et al., MiniCPM, 2024)."""
    start = 1 - config.decay_fraction
    return 1.0 if progress <= start else _linear((progress - start) / config.decay_fraction, config)


SCHEDULES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": lambda progress, config: 1.0}


def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of update `step` (0-based): linear warm-up over `warmup_steps`, then the schedule by name."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step + 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return peak * SCHEDULES[config.name](min(1.0, progress), config)
