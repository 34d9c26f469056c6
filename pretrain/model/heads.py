"""What stands on the trunk: a language model's logits, those of a task's labels, one vector for a text, or nothing.

Shapes: B batch, T time, D model width, V vocabulary, L labels. Padding is where `documents` [B, T] is -1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from pretrain.config.schema import ModelConfig
from pretrain.model.lora import freeze
from pretrain.model.output import Output
from pretrain.model.transformer import ACTIVATIONS, LayerCache, Transformer, new_norm


class Transform(nn.Module):
    """BERT's dense layer, activation and norm between the trunk and the output matrix (Devlin et al., 2018)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS.get(config.activation, ACTIVATIONS["gelu"])  # a gate has no place here
        self.dense = nn.Linear(config.width, config.width, bias=config.ffn_bias)
        self.norm = new_norm(config, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(x)))


class LanguageModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]; the output matrix is the embedding when they are tied."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)
        self.transform = Transform(config) if config.head_transform else nn.Identity()
        self.head = Output(config.width, config.vocab_size, config.head_bias, config.logit_softcap)
        if config.tied_embeddings:
            self.head.weight = self.trunk.embedding.weight

    def forward(
        self, tokens_BT: torch.Tensor, cache: list[LayerCache] | None = None, documents: torch.Tensor | None = None,
        segments: torch.Tensor | None = None, at: torch.Tensor | None = None, labels: torch.Tensor | None = None,
        z_loss: float = 0.0, with_hits: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """`documents` [B, T] numbers the documents of each row, padding -1: none of them sees another. `segments`
        [B, T]: the kind of segment of each token. With `at` (bool [B, T]) the logits of those positions only, [n, V].
        With `labels` [B, T] not the logits but what `Output` makes of both; `at` is then where there is a label.
        """
        hidden = self.trunk(tokens_BT, cache, documents, segments)
        return self.head(self.transform(hidden if at is None else hidden[at]), labels, z_loss, with_hits)


class PooledModel(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D] and BERT's pooled first token [B, D]."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)
        self.pooler = nn.Linear(config.width, config.width)

    def forward(
        self, tokens_BT: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(tokens_BT, None, documents, segments)
        return hidden, torch.tanh(self.pooler(hidden[:, 0]))


class HiddenStates(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)

    def forward(
        self, tokens_BT: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.trunk(tokens_BT, None, documents, segments)


class TaskModel(nn.Module):
    """Token ids [B, T] -> logits of a text's labels [B, L] (`sequence`), of each token's [B, T, L] (`tokens`), or of an
    answer's beginning and its end at each token [B, T, 2] (`span`).
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.pooling = config.pooling if config.head == "sequence" else None
        self.trunk = Transformer(config, activation_checkpointing)
        self.pooler = nn.Linear(config.width, config.width) if self.pooling == "pooler" else None
        self.transform = Transform(config) if config.head_transform else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, 2 if config.head == "span" else config.labels, bias=config.head_bias)

    def forward(
        self, tokens_BT: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.trunk(tokens_BT, None, documents, segments)
        if self.pooling is not None:
            x = pooled(x, documents, self.pooling)
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        return self.head(self.dropout(self.transform(x)))


class EmbeddingModel(nn.Module):
    """Token ids [B, T] -> a vector of length 1 for each row, fp32 [B, D]: their products are cosines (Reimers and
    Gurevych, "Sentence-BERT", 2019).
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.pooling = config.pooling
        self.trunk = Transformer(config, activation_checkpointing)

    def forward(
        self, tokens_BT: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_BD = pooled(self.trunk(tokens_BT, None, documents, segments), documents, self.pooling)
        return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=-1)


def pooled(hidden_BTD: torch.Tensor, documents_BT: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """[B, D]: the first token of each row, its last one that is no padding, or the mean over those that are none."""
    if pooling in ("first", "pooler"):
        return hidden_BTD[:, 0]
    if documents_BT is None:
        return hidden_BTD[:, -1] if pooling == "last" else hidden_BTD.mean(1)
    real_BT = documents_BT >= 0
    if pooling == "mean":
        return (hidden_BTD * real_BT[:, :, None]).sum(1) / real_BT.sum(1, keepdim=True).clamp(min=1)
    places_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    return hidden_BTD[torch.arange(len(real_BT), device=real_BT.device), (places_T * real_BT).argmax(1)]


HEADS = {
    "lm": LanguageModel, "pooled": PooledModel, "none": HiddenStates, "sequence": TaskModel, "tokens": TaskModel,
    "span": TaskModel, "embedding": EmbeddingModel,
}  # fmt: skip


class Unfilled(TorchFunctionMode):
    """What `torch.nn.init` would fill stays as it is: modules draw random weights that nobody wants."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_model(config: ModelConfig, activation_checkpointing: str = "none") -> nn.Module:
    """The model that `config.head` says, its weights still to be filled in: what they are now is what was in their
    memory. With `config.lora_rank` only the adapters are to be trained, and the head of a task.
    """
    with Unfilled():
        model = HEADS[config.head](config, activation_checkpointing)
    if config.lora_rank:
        freeze(model, config.head)
    return model


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the modules; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}


def trained_parameters(config: ModelConfig) -> list[str]:
    """The names of those that training changes: all, but for LoRA."""
    with torch.device("meta"):
        return [name for name, parameter in build_model(config).named_parameters() if parameter.requires_grad]
