"""What stands on the trunk: a language model's logits, BERT's pooled first token, or nothing.

Shapes: B batch, T time, D model width, V vocabulary.
"""

import torch
from torch import nn

from pretrain.config import ModelConfig
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

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)
        self.transform = Transform(config) if config.head_transform else nn.Identity()
        self.head = nn.Linear(config.width, config.vocab_size, bias=config.head_bias)
        if config.tied_embeddings:
            self.head.weight = self.trunk.embedding.weight
        self.softcap = config.logit_softcap

    def forward(
        self, tokens_BT: torch.Tensor, cache: list[LayerCache] | None = None, documents: torch.Tensor | None = None,
        segments: torch.Tensor | None = None, at: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`documents` [B, T] numbers the documents of each row, padding -1: none of them sees another. `segments`
        [B, T]: the kind of segment of each token. With `at` (bool [B, T]) the logits of those positions only, [n, V].
        """
        hidden = self.trunk(tokens_BT, cache, documents, segments)
        logits = self.head(self.transform(hidden if at is None else hidden[at]))
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


class PooledModel(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D] and BERT's pooled first token [B, D]."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
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

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)

    def forward(
        self, tokens_BT: torch.Tensor, documents: torch.Tensor | None = None, segments: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.trunk(tokens_BT, None, documents, segments)


HEADS = {"lm": LanguageModel, "pooled": PooledModel, "none": HiddenStates}


def build_model(config: ModelConfig, activation_checkpointing: bool = False) -> nn.Module:
    """The model that `config.head` says, its weights still to be filled in."""
    return HEADS[config.head](config, activation_checkpointing)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the modules; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
