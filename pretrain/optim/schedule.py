"""The learning rate as a pure function of the step."""

import math

from pretrain.config.schema import ScheduleConfig


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
