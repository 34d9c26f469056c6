"""The configuration of a run as frozen dataclasses, and the checks on it. `compose` fills them from Hydra.

`conf/` holds every default, so the dataclasses have none. Each mistake is a `ValueError` that names the key and what to
do instead.
"""

import difflib
import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Optional

import yaml


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives: everything it writes is under `folder`, which is root/name."""

    name: str
    root: str

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


@dataclass(frozen=True)
class PhaseConfig:
    """What changes at a step of a run. What is not said stays as it was before."""

    from_step: int
    seq_len: Optional[int] = None  # noqa: UP045 (OmegaConf reads these types)
    global_batch_size: Optional[int] = None  # noqa: UP045
    micro_batch_size: Optional[int] = None  # noqa: UP045
    weights: Optional[list[float]] = None  # noqa: UP045


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision. Batch sizes count samples of `seq_len` tokens, `save_every`, `eval_every` steps."""

    steps: int
    global_batch_size: int
    micro_batch_size: int
    seq_len: int
    phases: list[PhaseConfig]
    precision: str
    save_every: int
    keep_checkpoints: int
    eval_every: int
    eval_samples: int
    activation_checkpointing: bool


@dataclass(frozen=True)
class ModelConfig:
    """One Transformer, its parts by name. `vocab_size`, `kv_heads` and `ffn_width` of 0 mean: derive it."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_width: int
    max_positions: int
    causal: bool
    positions: str
    rope_theta: float
    norm: str
    norm_position: str
    norm_eps: float
    activation: str
    qk_norm: bool
    bias: bool
    tied_embeddings: bool
    dropout: float
    attention: str
    init: str
    init_std: float


@dataclass(frozen=True)
class DataConfig:
    """Folders or URLs of shards: `train` one or a list of them with their `weights`; how they are packed and read."""

    train: Any
    weights: Optional[list[float]]  # noqa: UP045
    val: Optional[str]  # noqa: UP045
    tokenizer: Optional[str]  # noqa: UP045
    packing: str
    document_mask: bool
    quarantine: bool
    prefetch_batches: int
    cache: str
    cache_gb: float

    @property
    def sources(self) -> list[str]:
        """The training sources, one or several."""
        listed = self.train if isinstance(self.train, list) else [self.train]
        return [source for source in listed if source is not None]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    name: str


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer at its peak learning rate. `grad_clip` is the largest global gradient norm, 0 for no clipping."""

    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip: float


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps, as a factor of `optim.lr`; `decay_fraction` is the decaying tail of WSD."""

    name: str
    warmup_steps: int
    min_lr_ratio: float
    decay_fraction: float


@dataclass(frozen=True)
class DeepSpeedConfig:
    """ZeRO stage, and settings passed on to DeepSpeed, checked against its own configuration model."""

    stage: int
    extra: dict[str, Any]


@dataclass(frozen=True)
class LogConfig:
    """Where the metrics go besides the journal, and the prompt of the sample text in the report."""

    wandb: str
    project: str
    console: bool
    sample_prompt: str
    sample_tokens: int


@dataclass(frozen=True)
class GuardConfig:
    """What happens when a loss is not finite: `stop` the run, or `ignore` it."""

    on_nonfinite: str


@dataclass(frozen=True)
class Config:
    """A whole run. Each module takes its own section, never all of it."""

    seed: int
    resume: str
    run: RunConfig
    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    deepspeed: DeepSpeedConfig
    log: LogConfig
    guard: GuardConfig


CHOICES = {
    "resume": ("auto", "never"),
    "train.precision": ("auto", "bf16", "fp32"),
    "model.positions": ("rope", "learned", "sinusoidal", "none"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_position": ("pre", "post"),
    "model.activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu2"),
    "model.attention": ("sdpa", "plain"),
    "model.init": ("scaled", "zero_residual"),
    "data.packing": ("window", "best_fit"),
    "objective.name": ("causal_lm",),
    "optim.name": ("adamw",),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "deepspeed.stage": (0, 1, 2, 3),
    "log.wandb": ("offline", "online", "disabled"),
    "guard.on_nonfinite": ("stop", "ignore"),
}
POSITIVE = (
    "train.steps", "train.global_batch_size", "train.micro_batch_size", "train.seq_len", "train.keep_checkpoints",
    "model.layers", "model.width", "model.heads", "model.max_positions", "model.norm_eps", "model.init_std",
    "optim.lr", "optim.eps", "data.prefetch_batches", "data.cache_gb",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "train.save_every", "train.eval_every", "train.eval_samples", "model.vocab_size", "model.kv_heads",
    "model.ffn_width", "optim.weight_decay", "optim.grad_clip", "schedule.warmup_steps", "log.sample_tokens",
)  # fmt: skip
FRACTIONS = ("model.dropout", "optim.beta1", "optim.beta2", "schedule.min_lr_ratio", "schedule.decay_fraction")

# A change of these makes another run; of anything else, the same run under other conditions.
UNSAFE_TO_CHANGE = ("seed", "data.packing", "data.document_mask", "model", "objective", "optim.name")
SAFE_TO_CHANGE = ("model.attention",)  # another kernel for the same formula


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a (nested) dataclass."""
    flat = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def differences(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The changed keys as `key: old -> new`: (those that a run can be continued with, those that it can not)."""
    before, after = flatten(old), flatten(new)
    changed = [key for key in after if before[key] != after[key] and not key.startswith(("run.", "resume"))]
    unsafe = [
        key for key in changed
        if key not in SAFE_TO_CHANGE and any(key == name or key.startswith(name + ".") for name in UNSAFE_TO_CHANGE)
    ]  # fmt: skip
    lines = {key: f"{key}: {before[key]} -> {after[key]}" for key in changed}
    return [lines[key] for key in changed if key not in unsafe], [lines[key] for key in unsafe]


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


def check(config: Config) -> None:
    """Values and combinations that can be judged without data and ranks."""
    flat = flatten(config)
    for key, names in CHOICES.items():
        if flat[key] not in names:
            near = difflib.get_close_matches(str(flat[key]), map(str, names), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}={flat[key]}: choose one of {', '.join(map(str, names))}{hint}")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be finite")
        if key in POSITIVE and value <= 0:
            raise ValueError(f"{key}={value} must be greater than 0")
        if key in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{key}={value} must not be negative")
        if key in FRACTIONS and not 0 <= value <= 1:
            raise ValueError(f"{key}={value} must lie between 0 and 1")
    _check_run_name(config.run.name)
    _check_sources(config.data, config.train)
    _check_phases(config.train)
    _check_model(config.model, config.train)


def _check_run_name(name: str) -> None:
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or name != name.strip():
        raise ValueError(f"run.name={name!r} must be a plain folder name, without slashes; the folder goes to run.root")


def _check_sources(data: DataConfig, train: TrainConfig) -> None:
    if not all(isinstance(source, str) and source for source in data.sources):
        raise ValueError(f"data.train={data.train} must be a folder or URL of shards, or a list of them: [a,b]")
    lists = {"data.weights": data.weights}
    lists |= {f"train.phases[{i}].weights": phase.weights for i, phase in enumerate(train.phases)}
    for key, weights in lists.items():
        if weights is not None and (len(weights) != len(data.sources) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"{key}={weights} must be a number for each of the {len(data.sources)} sources of data.train, none "
                "below 0 and one above it"
            )


def _check_phases(train: TrainConfig) -> None:
    last = 0
    for i, phase in enumerate(train.phases):
        if phase.from_step <= last:
            raise ValueError(f"train.phases[{i}].from_step={phase.from_step} must come after step {last}")
        last = phase.from_step
        for key in ("seq_len", "global_batch_size", "micro_batch_size"):
            value = getattr(phase, key)
            if value is not None and value <= 0:
                raise ValueError(f"train.phases[{i}].{key}={value} must be greater than 0")


def _check_model(model: ModelConfig, train: TrainConfig) -> None:
    if model.width % model.heads:
        raise ValueError(f"model.width={model.width} must be a multiple of model.heads={model.heads}")
    if model.kv_heads and model.heads % model.kv_heads:
        raise ValueError(f"model.heads={model.heads} must be a multiple of model.kv_heads={model.kv_heads}")
    if model.positions == "rope" and model.width // model.heads % 2:
        raise ValueError(f"model.positions=rope needs an even head width; it is {model.width // model.heads}")
    longest = max(phase.seq_len for phase in phases(train))
    if longest > model.max_positions:
        raise ValueError(
            f"train.seq_len={longest} is longer than model.max_positions={model.max_positions}: "
            "shorten the first or raise the second"
        )
