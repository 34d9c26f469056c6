"""Which weights a fine-tuning run changes, and how fast: functions of a parameter's name."""

from collections.abc import Callable

from pretrain.config.schema import ModelConfig, TuningConfig


def trainable(config: TuningConfig, model: ModelConfig) -> Callable[[str], bool]:
    """Whether a parameter learns. Under `lora` the model says so itself (`model.lora`)."""
    first = frozen_layers(config, model)

    def learns(name: str) -> bool:
        if config.method in ("full", "lora") or not name.startswith("trunk."):
            return True
        block = _block(name)
        is_last = name.startswith("trunk.norm.") if block is None else block >= first
        return config.method == "last_layers" and is_last

    if config.method == "head" and model.head == "lm" and model.tied_embeddings:
        raise ValueError("tuning=head: the output matrix of this model is its embedding, no head stands alone: take "
                         "tuning=last_layers or tuning=lora")  # fmt: skip
    if config.method == "head" and model.head == "embedding":
        raise ValueError("tuning=head: an embedding has no weights of its own above the trunk: take tuning=last_layers")
    return learns


def frozen_layers(config: TuningConfig, model: ModelConfig) -> int:
    """How many of the lowest blocks have nothing that learns, in them or below."""
    return {"head": model.layers, "last_layers": model.layers - config.last_layers}.get(config.method, 0)


def lr_scale(config: TuningConfig, model: ModelConfig) -> Callable[[str], float]:
    """The factor of a parameter's learning rate: the head's 1, each block's `layer_lr_decay` times that of what stands
    above it, the embeddings' the smallest (Howard and Ruder, ULMFiT, 2018; Clark et al., ELECTRA, 2020).
    """

    def scale(name: str) -> float:
        if not name.startswith("trunk.") or name.startswith("trunk.norm."):
            return 1.0
        block = _block(name)
        return config.layer_lr_decay ** (model.layers + 1 if block is None else model.layers - block)

    return scale


def _block(name: str) -> int | None:
    """The number of the block that a parameter is in."""
    return int(name.split(".")[2]) if name.startswith("trunk.blocks.") else None
