"""The configuration of a run as frozen dataclasses. `compose` fills them from Hydra, `checks` judges them.

`conf/` holds every default, so the dataclasses have none.
"""

from dataclasses import asdict, dataclass, fields, is_dataclass
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
    """Length, batch and precision. Batch sizes count samples of `seq_len` tokens, `save_every`, `eval_every` steps.

    `steps` of 0 means: as many as `epochs` passes over the data take (`with_steps`).
    """

    steps: int
    epochs: float
    global_batch_size: int
    micro_batch_size: int
    seq_len: int
    phases: list[PhaseConfig]
    precision: str
    deterministic: bool
    save_every: int
    keep_checkpoints: int
    checkpoint_file_gb: float
    eval_every: int
    eval_samples: int
    activation_checkpointing: str
    compile: str


@dataclass(frozen=True)
class ModelConfig:
    """One Transformer, its parts by name; conf/model/_base.yaml says what each key means.

    `vocab_size`, `kv_heads`, `head_width` and `ffn_width` of 0 mean: derive it.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    max_positions: int
    causal: bool
    positions: str
    rope_theta: float
    rope_scaling: str
    rope_factor: float
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_original_positions: int
    sliding_window: int
    global_every: int
    local_rope_theta: float
    norm: str
    norm_position: str
    norm_eps: float
    norm_bias: bool
    embedding_norm: bool
    scaled_embeddings: bool
    segments: int
    activation: str
    qk_norm: bool
    attention_bias: bool
    ffn_bias: bool
    tied_embeddings: bool
    head: str
    labels: int
    pooling: str
    head_transform: bool
    head_bias: bool
    value_embeddings: int
    logit_softcap: float
    lora_rank: int
    lora_alpha: float
    lora_on: str
    dropout: float
    attention: str
    init: str
    init_std: float


@dataclass(frozen=True)
class DataConfig:
    """Folders or URLs of shards, `train` (with `weights`) and `val` one or a list of them; how they are read."""

    train: Any
    weights: Optional[list[float]]  # noqa: UP045
    val: Any
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
    """What the model learns to predict; `mask_rate` and `whole_word` are masked_lm's."""

    name: str
    mask_rate: float
    whole_word: bool
    z_loss: float


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer at its peak learning rate. `grad_clip` is the largest global gradient norm, 0 for no clipping.

    `momentum` is Muon's, `beta1`, `beta2` and `eps` AdamW's, which under `muon` steps what is no matrix of a block, at
    `adamw_lr_scale` times the learning rate; an untied table of embeddings has `embedding_lr_scale` times that again.
    """

    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    adamw_lr_scale: float
    embedding_lr_scale: float
    base_width: int
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
class TaskConfig:
    """What a fine-tuned model is to do, and the columns of its examples; conf/task/ says which keys a task reads."""

    name: str
    text: str
    text_pair: Optional[str]  # noqa: UP045
    label: str
    labels: Optional[list[str]]  # noqa: UP045
    multi_label: bool
    class_weights: str
    pooling: Optional[str]  # noqa: UP045
    tokens: str
    tags: str
    question: str
    context: str
    answers: str
    unanswerable: Optional[bool]  # noqa: UP045
    stride: int
    max_answer_tokens: int
    query: str
    document: str
    score: str
    temperature: float
    prompt: str
    response: str
    messages: str
    template: Optional[str]  # noqa: UP045
    figures: str
    generate_samples: int
    max_new_tokens: int
    drop_bad: bool


@dataclass(frozen=True)
class TuningConfig:
    """Which weights a fine-tuning run changes, how fast in which layer, and which checkpoint is the best."""

    method: str
    last_layers: int
    lora_rank: int
    lora_alpha: float
    lora_on: str
    layer_lr_decay: float
    best: Optional[str]  # noqa: UP045
    early_stopping: int


@dataclass(frozen=True)
class Config:
    """A whole run. Each module takes its own section, never all of it. Pretraining has no `task` and no `tuning`."""

    seed: int
    resume: str
    init: Optional[str]  # noqa: UP045
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
    task: Optional[TaskConfig] = None  # noqa: UP045
    tuning: Optional[TuningConfig] = None  # noqa: UP045


# Keys that models, training, optimizers and tasks of earlier versions lack, with what those are.
ADDED_TO_MODELS = {"labels": 0, "pooling": "first", "lora_rank": 0, "lora_alpha": 16.0, "lora_on": "all",
                   "value_embeddings": 0}  # fmt: skip
ADDED_TO_TRAINING = {"epochs": 0.0, "deterministic": False, "checkpoint_file_gb": 4.0, "compile": "auto"}
ADDED_TO_OPTIMIZERS = {"momentum": 0.95, "adamw_lr_scale": 1.0, "embedding_lr_scale": 1.0, "base_width": 0}
ADDED_TO_TASKS = {"pooling": None}


# A change of these makes another run; of anything else, the same run under other conditions.
UNSAFE_TO_CHANGE = (
    "seed", "init", "data.packing", "data.document_mask", "model", "objective", "optim.name", "task", "tuning",
)  # fmt: skip
SAFE_TO_CHANGE = (
    "model.attention",  # another kernel for the same formula
    "task.generate_samples", "task.max_new_tokens", "tuning.early_stopping",
)  # fmt: skip


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
    changed = [key for key in after if before.get(key) != after[key] and not key.startswith(("run.", "resume"))]
    unsafe = [
        key for key in changed
        if key not in SAFE_TO_CHANGE and any(key == name or key.startswith(name + ".") for name in UNSAFE_TO_CHANGE)
    ]  # fmt: skip
    lines = {key: f"{key}: {before.get(key)} -> {after[key]}" for key in changed}
    return [lines[key] for key in changed if key not in unsafe], [lines[key] for key in unsafe]
