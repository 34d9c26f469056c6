"""What stands on the trunk: the language-model head."""

import torch
from torch import nn

from pretrain.config import ModelConfig
from pretrain.model.transformer import LayerCache, Transformer


class LanguageModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]; the output matrix is the embedding when they are tied."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.trunk = Transformer(config, activation_checkpointing)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.trunk.embedding.weight

    def forward(
        self, tokens_BT: torch.Tensor, cache: list[LayerCache] | None = None, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`documents` [B, T] numbers the documents of each row, padding -1: none of them sees another."""
        return self.head(self.trunk(tokens_BT, cache, documents))
