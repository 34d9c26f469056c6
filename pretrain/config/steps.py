"""How many steps a run takes, and of which shape the batch of each one is: functions of the configuration."""

import math
from dataclasses import fields, replace

from pretrain.config.schema import Config, PhaseConfig, TrainConfig


def phases(train: TrainConfig, weights: list[float] | None = None) -> list[PhaseConfig]:
    """The phases of a run with nothing left open: its own settings from step 0, then what `train.phases` changes."""
    plan = [PhaseConfig(0, train.seq_len, train.global_batch_size, train.micro_batch_size, weights)]
    for phase in train.phases:
        said = {field.name: getattr(phase, field.name) for field in fields(phase)}
        plan.append(replace(plan[-1], **{name: value for name, value in said.items() if value is not None}))
    return plan


def at_step(train: TrainConfig, step: int) -> TrainConfig:
    """The settings that hold for the step after `step` steps."""
    now = [phase for phase in phases(train) if phase.from_step <= step][-1]
    return replace(
        train, seq_len=now.seq_len, global_batch_size=now.global_batch_size, micro_batch_size=now.micro_batch_size
    )


def with_steps(config: Config, epoch_samples: int) -> Config:
    """Where `steps` is open: with those that `epochs` passes over the data take, and a warm-up of at most a tenth."""
    if config.train.steps:
        return config
    steps = max(1, math.ceil(config.train.epochs * epoch_samples / config.train.global_batch_size))
    warmup = min(config.schedule.warmup_steps, steps // 10)
    return replace(
        config, train=replace(config.train, steps=steps), schedule=replace(config.schedule, warmup_steps=warmup)
    )


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches a rank accumulates for one step: global / (micro x ranks), which must divide exactly."""
    per_micro_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_micro_step == 0:
        return train.global_batch_size // per_micro_step
    lower = train.global_batch_size // per_micro_step * per_micro_step
    sizes = " or ".join(str(size) for size in (lower, lower + per_micro_step) if size)
    per_rank = train.global_batch_size // world_size
    fits = train.global_batch_size % world_size == 0
    micros = [m for m in range(1, per_rank + 1) if fits and per_rank % m == 0]
    also = f", or train.micro_batch_size one of {', '.join(map(str, micros))}" if micros else ""
    raise ValueError(
        f"train.global_batch_size={train.global_batch_size} does not divide by train.micro_batch_size="
        f"{train.micro_batch_size} x {world_size} ranks: take train.global_batch_size={sizes}{also}"
    )
