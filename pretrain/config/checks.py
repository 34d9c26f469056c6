"""What a configuration must be before anything starts. A mistake is a `ValueError` that names the key and what to do.

Judged here is what needs neither data nor ranks.
"""

import difflib
import math
from typing import Any

from pretrain.config.schema import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig, flatten
from pretrain.config.steps import phases

READS = {  # what a task, a method, or an optimizer reads of those settings that not all of them read
    "task": {
        "classification": {"text", "text_pair", "label", "labels", "multi_label", "class_weights", "pooling"},
        "token_classification": {"tokens", "tags", "labels"},
        "extractive_qa": {"question", "context", "answers", "unanswerable", "stride", "max_answer_tokens"},
        "instruct": {"prompt", "response", "messages", "template", "figures", "generate_samples", "max_new_tokens"},
        "language_model": {"text"},
        "embedding": {"query", "document", "score", "temperature", "pooling"},
    },
    "tuning": {
        "full": {"layer_lr_decay"}, "head": set(), "last_layers": {"last_layers", "layer_lr_decay"},
        "lora": {"lora_rank", "lora_alpha", "lora_on", "layer_lr_decay"},
    },
    "optim": {"adamw": set(), "muon": {"momentum", "adamw_lr_scale"}},
}  # fmt: skip
TASKS = tuple(READS["task"])
CHOICES = {
    "resume": ("auto", "never"),
    "train.precision": ("auto", "bf16", "fp16", "fp32"),
    "train.activation_checkpointing": ("none", "ffn", "full"),
    "train.compile": ("auto", "blocks", "none"),
    "model.positions": ("rope", "learned", "sinusoidal", "none"),
    "model.rope_scaling": ("none", "linear", "llama3", "yarn"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_position": ("pre", "post"),
    "model.activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2"),
    "model.head": ("lm", "pooled", "none", "sequence", "tokens", "span", "embedding"),
    "model.pooling": ("first", "last", "mean", "pooler"),
    "model.lora_on": ("all", "attention"),
    "model.attention": ("sdpa", "plain"),
    "model.init": ("scaled", "normal", "zero_residual", "xavier", "fan_in"),
    "data.packing": ("window", "best_fit", "none"),
    "objective.name": ("causal_lm", "masked_lm"),
    "optim.name": tuple(READS["optim"]),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "deepspeed.stage": (0, 1, 2, 3),
    "task.name": TASKS,
    "task.class_weights": ("none", "balanced"),
    "task.pooling": (None, "first", "last", "mean"),
    "task.figures": ("none", "translation", "summaries", "answers"),
    "tuning.method": tuple(READS["tuning"]),
    "log.wandb": ("offline", "online", "disabled"),
    "guard.on_nonfinite": ("stop", "ignore"),
}
POSITIVE = (
    "train.global_batch_size", "train.micro_batch_size", "train.seq_len", "train.keep_checkpoints", "model.layers",
    "model.width", "model.heads", "model.max_positions", "model.norm_eps", "model.init_std", "model.rope_theta",
    "model.rope_factor", "model.lora_alpha", "objective.mask_rate", "optim.lr", "optim.eps", "optim.adamw_lr_scale",
    "optim.embedding_lr_scale", "data.prefetch_batches", "data.cache_gb", "task.max_answer_tokens", "task.temperature",
    "task.max_new_tokens", "tuning.last_layers", "tuning.lora_rank", "tuning.lora_alpha", "tuning.layer_lr_decay",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "train.steps", "train.epochs", "train.save_every", "train.checkpoint_file_gb", "train.eval_every",
    "train.eval_samples", "model.vocab_size", "model.kv_heads", "model.head_width", "model.ffn_width",
    "model.rope_original_positions", "model.sliding_window", "model.global_every", "model.local_rope_theta",
    "model.segments", "model.labels", "model.lora_rank", "model.logit_softcap", "model.value_embeddings",
    "objective.z_loss", "optim.weight_decay", "optim.grad_clip", "optim.base_width", "schedule.warmup_steps",
    "log.sample_tokens", "task.stride", "task.generate_samples", "tuning.early_stopping",
)  # fmt: skip
FRACTIONS = (
    "model.dropout", "objective.mask_rate", "optim.beta1", "optim.beta2", "optim.momentum", "schedule.min_lr_ratio",
    "schedule.decay_fraction", "tuning.layer_lr_decay",
)  # fmt: skip


def check(config: Config) -> None:
    """Values and combinations of a whole run."""
    _check_values(flatten(config))
    _check_run_name(config.run.name)
    _check_sources(config.data, config.train)
    _check_phases(config.train)
    _check_parts(config.model)
    if not config.train.steps and not config.train.epochs:
        raise ValueError("train.steps=0 and train.epochs=0 train nothing: give one of them")
    if config.tuning:
        _check_tuning(config)
    elif config.data.packing == "none":
        raise ValueError("data.packing=none is for examples (pretrain.finetune): take window or best_fit")
    if config.optim.embedding_lr_scale != 1 and config.model.tied_embeddings:
        raise ValueError(
            f"optim.embedding_lr_scale={config.optim.embedding_lr_scale}: the embeddings of this model are its output "
            "matrix too, which would have that rate: take optim.embedding_lr_scale=1, or model.tied_embeddings=false"
        )
    if config.optim.base_width and config.model.tied_embeddings:
        raise ValueError(
            f"optim.base_width={config.optim.base_width}: the output matrix of this model is its embeddings, and no "
            "rate fits both: take model.tied_embeddings=false"
        )
    longest = max(phase.seq_len for phase in phases(config.train))
    if longest > config.model.max_positions:
        raise ValueError(
            f"train.seq_len={longest} is longer than model.max_positions={config.model.max_positions}: "
            "shorten the first or raise the second"
        )


def check_model(model: ModelConfig) -> None:
    """Values and combinations of a model alone."""
    _check_values(flatten(model, "model."))
    _check_parts(model)


def check_objective(objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Whether the model can learn what it is asked."""
    needs_causal = objective.name == "causal_lm"
    if needs_causal != model.causal:
        other = "masked_lm" if needs_causal else "causal_lm"
        looks = "looks ahead" if needs_causal else "looks back only"
        raise ValueError(
            f"objective={objective.name} does not fit a model that {looks} (model.causal={str(model.causal).lower()}): "
            f"take objective={other}, or another model"
        )
    if model.head != "lm":
        raise ValueError(f"objective={objective.name} needs a model with a language-model head: add model.head=lm")


def _check_values(flat: dict[str, Any]) -> None:
    for key, value in flat.items():
        if key in CHOICES and value not in CHOICES[key]:
            near = difflib.get_close_matches(str(value), map(str, CHOICES[key]), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if key == "log.wandb" and str(value) in ("none", "off", "false", "null"):
                hint = "; log=none is without W&B"
            raise ValueError(f"{key}={value}: choose one of {', '.join(map(str, CHOICES[key]))}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be finite")
        if key in POSITIVE and value <= 0:
            raise ValueError(f"{key}={value} must be greater than 0")
        if key in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{key}={value} must not be negative")
        if key in FRACTIONS and not 0 <= value <= 1:
            raise ValueError(f"{key}={value} must lie between 0 and 1")


def _check_run_name(name: str) -> None:
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or name != name.strip():
        raise ValueError(f"run.name={name!r} must be a plain folder name, without slashes; the folder goes to run.root")


def _check_sources(data: DataConfig, train: TrainConfig) -> None:
    if not all(isinstance(source, str) and source for source in data.sources):
        raise ValueError(f"data.train={data.train} must be a folder or URL of shards, or a list of them: [a,b]")
    listed = data.val if isinstance(data.val, list) else [data.val or "none"]
    if not all(isinstance(place, str) and place for place in listed):
        raise ValueError(f"data.val={data.val} must be a path or URL, or a list of them: [a,b]; each may have a name: "
                         "[news=a,web=b]")  # fmt: skip
    lists = {"data.weights": data.weights}
    lists |= {f"train.phases[{i}].weights": phase.weights for i, phase in enumerate(train.phases)}
    for key, weights in lists.items():
        if weights is not None and (len(weights) != len(data.sources) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"{key}={weights} must be a number for each of the {len(data.sources)} sources of data.train, none "
                "below 0 and one above it"
            )


def _check_tuning(config: Config) -> None:
    if config.train.phases or config.data.weights:
        raise ValueError("train.phases and data.weights are for shards of tokens (pretrain.train), not for examples")
    if config.tuning.method == "last_layers" and config.tuning.last_layers > config.model.layers:
        raise ValueError(f"tuning.last_layers={config.tuning.last_layers}: the model has {config.model.layers} layers")
    if not config.init and config.tuning.method != "full":
        raise ValueError(f"tuning={config.tuning.method} keeps the weights that it starts from, and a model that "
                         "begins anew has none: give init=..., or tuning=full")  # fmt: skip
    if not config.data.val and (config.tuning.best or config.tuning.early_stopping):
        raise ValueError("tuning.best and tuning.early_stopping judge held-out examples: give data.val")
    if config.task.multi_label and config.task.class_weights != "none":
        raise ValueError("task.class_weights is for one label a text: leave it out with task.multi_label=true")
    if config.task.figures != "none" and not config.task.generate_samples:
        raise ValueError(f"task.figures={config.task.figures} is of responses: give task.generate_samples")
    if config.optim.name == "muon" and config.tuning.method in ("head", "lora"):
        raise ValueError(f"optim=muon is for the matrices of the blocks, and with tuning={config.tuning.method} none "
                         "of them learns: take optim=adamw")  # fmt: skip
    if config.data.packing == "window":
        raise ValueError("data.packing=window is for shards of tokens: take best_fit or none")
    if config.model.lora_rank:
        raise ValueError("model.lora_rank is set by tuning=lora tuning.lora_rank=N")


def check_said(config: Config, section: str, said: dict[str, str]) -> None:
    """The keys of a section of `READS` that the user gave, each with where it came from: what is chosen there must read
    them.
    """
    chosen = config.tuning.method if section == "tuning" else getattr(config, section).name
    for key in sorted(said.keys() - READS[section][chosen]):
        if readers := [name for name, keys in READS[section].items() if key in keys]:
            raise ValueError(f"{section}.{key} (from {said[key]}) is for {section}={' or '.join(readers)}, not "
                             f"{chosen}: drop it")  # fmt: skip


def _check_phases(train: TrainConfig) -> None:
    if not train.steps and any(phase.seq_len != train.seq_len for phase in phases(train)):
        raise ValueError("train.epochs counts rows of one length, and train.phases has others: give train.steps")
    last = 0
    for i, phase in enumerate(train.phases):
        if phase.from_step <= last:
            raise ValueError(f"train.phases[{i}].from_step={phase.from_step} must come after step {last}")
        last = phase.from_step
        for key in ("seq_len", "global_batch_size", "micro_batch_size"):
            value = getattr(phase, key)
            if value is not None and value <= 0:
                raise ValueError(f"train.phases[{i}].{key}={value} must be greater than 0")


def _check_parts(model: ModelConfig) -> None:
    if model.width % model.heads and not model.head_width:
        raise ValueError(
            f"model.width={model.width} must be a multiple of model.heads={model.heads}, or model.head_width be given"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise ValueError(f"model.heads={model.heads} must be a multiple of model.kv_heads={model.kv_heads}")
    head_width = model.head_width or model.width // model.heads
    if model.positions == "rope" and head_width % 2:
        raise ValueError(f"model.positions=rope needs an even head width; it is {head_width}")
    if model.positions == "sinusoidal" and model.width % 2:
        raise ValueError(f"model.positions=sinusoidal needs an even model.width; it is {model.width}")
    if model.rope_scaling != "none" and model.positions != "rope":
        raise ValueError(f"model.rope_scaling={model.rope_scaling} is for model.positions=rope, not {model.positions}")
    if model.rope_scaling in ("llama3", "yarn") and not model.rope_original_positions:
        raise ValueError(
            f"model.rope_scaling={model.rope_scaling} needs model.rope_original_positions: the longest sequence that "
            "the model was first trained on"
        )
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise ValueError("model.rope_high_freq_factor must be greater than model.rope_low_freq_factor")
    if model.global_every and not model.sliding_window:
        raise ValueError("model.global_every says which layers have no window: give model.sliding_window too")
    _check_head(model)


def _check_head(model: ModelConfig) -> None:
    labelled, has_matrix = model.head in ("sequence", "tokens"), model.head not in ("pooled", "none", "embedding")
    if not has_matrix and (model.head_transform or model.head_bias):
        raise ValueError(f"model.head={model.head} has no output matrix: drop head_transform, head_bias")
    if model.value_embeddings > model.layers:
        raise ValueError(f"model.value_embeddings={model.value_embeddings} is more than model.layers={model.layers}")
    if model.head != "lm" and model.logit_softcap:
        raise ValueError(f"model.logit_softcap is for model.head=lm, not {model.head}: drop it")
    if labelled != (model.labels > 0):
        raise ValueError(f"model.labels={model.labels}: model.head={model.head} has {'one or more' if labelled else 0}")
    if model.pooling != "first" and model.head not in ("sequence", "embedding"):
        raise ValueError(f"model.pooling={model.pooling} is for model.head=sequence or embedding, not {model.head} "
                         "(task.pooling is for the head that a task gives it)")  # fmt: skip
    if model.pooling == "pooler" and model.head == "embedding":
        raise ValueError("model.pooling=pooler is for model.head=sequence: an embedding is first, last or mean")
