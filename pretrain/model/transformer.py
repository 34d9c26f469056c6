"""One Transformer trunk, causal or bidirectional, its parts chosen by name in the config.

Shapes: B batch, T time, D model width, H heads, G key/value heads, K head width, F feed-forward width.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.model.attention import ATTENTION, same_document

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
GATED = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),  # So et al., "Primer", 2021
}


def ffn_width(config: ModelConfig) -> int:
    """`config.ffn_width`, or 4 x width; gated: 8/3 x width (as many parameters) rounded up to a multiple of 64."""
    if config.ffn_width:
        return config.ffn_width
    return -(-8 * config.width // 3 // 64) * 64 if config.activation in GATED else 4 * config.width


def _norm(config: ModelConfig, width: int) -> nn.Module:
    return NORMS[config.norm](width, eps=config.norm_eps)


@dataclass
class LayerCache:
    """Keys and values of the positions seen so far, of one layer: [B, G, capacity, K], `length` of them filled."""

    k: torch.Tensor
    v: torch.Tensor
    length: int = 0

    def extend(self, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + k_BGTK.shape[2]
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k_BGTK, v_BGTK
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head or grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kv_heads = config.kv_heads or config.heads
        self.head_width = config.width // config.heads
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.k = nn.Linear(config.width, self.kv_heads * self.head_width, bias=config.bias)
        self.v = nn.Linear(config.width, self.kv_heads * self.head_width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.q_norm = _norm(config, self.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(config, self.head_width) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: torch.Tensor, rope: torch.Tensor | None, cache: LayerCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        q, k, v = self.q_norm(heads(self.q(x_BTD))), self.k_norm(heads(self.k(x_BTD))), heads(self.v(x_BTD))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.config.dropout if self.training else 0.0
        mixed_BHTK = ATTENTION[self.config.attention](q, k, v, self.config.causal, dropout, mask)
        return self.out(mixed_BHTK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices and an activation, or three with a gate (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        width = ffn_width(config)
        self.up = nn.Linear(config.width, width, bias=config.bias)
        self.gate = nn.Linear(config.width, width, bias=config.bias) if config.activation in GATED else None
        self.down = nn.Linear(width, config.width, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.down(GATED[self.activation](self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, normalised before (pre) or after (post)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.attention_norm, self.attention = _norm(config, config.width), Attention(config)
        self.ffn_norm, self.ffn = _norm(config, config.width), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: torch.Tensor, rope: torch.Tensor | None, cache: LayerCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rope, cache, mask))
            return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, rope, cache, mask)))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))


class Transformer(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config, config.width)

    def forward(
        self, tokens_BT: torch.Tensor, cache: list[LayerCache] | None = None, documents_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`documents_BT` numbers the documents of each row (padding -1): each is computed as if it stood alone."""
        start = cache[0].length if cache else 0
        place, mask = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device), None
        if documents_BT is not None:
            assert cache is None, "documents are for whole rows"
            place, mask = places_in_documents(documents_BT), same_document(documents_BT, self.config.causal)
        x_BTD = self.embedding(tokens_BT)
        rope = None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(place)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(place, self.config.width).to(x_BTD.dtype)
        elif self.config.positions == "rope":
            rope = rotations(place, self.config.width // self.config.heads, self.config.rope_theta).to(x_BTD.dtype)
        x_BTD = self.dropout(x_BTD)
        if not self.config.norm_position == "pre":
            x_BTD = self.norm(x_BTD)
        for index, block in enumerate(self.blocks):
            layer_cache = cache[index] if cache else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rope, layer_cache, mask, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rope, layer_cache, mask)
        return self.norm(x_BTD) if self.config.norm_position == "pre" else x_BTD

    def new_cache(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty key/value caches for `capacity` positions."""
        weight, heads = self.embedding.weight, self.config.kv_heads or self.config.heads
        shape = (batch, heads, capacity, self.config.width // self.config.heads)
        return [LayerCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.blocks]


def places_in_documents(documents_BT: torch.Tensor) -> torch.Tensor:
    """The place of each token in its document [B, T], from 0 on."""
    place_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
    return place_T - (place_T * begins_BT).cummax(1).values


def sinusoids(place: torch.Tensor, width: int) -> torch.Tensor:
    """[..., D] of Vaswani et al., 2017, section 3.5: sin(place / 10000^(2i/D)) at 2i, the cosine at 2i + 1."""
    angles = _angles(place, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def rotations(place: torch.Tensor, head_width: int, theta: float) -> torch.Tensor:
    """Cosines and sines of rotary positions (Su et al., RoFormer, 2021), in fp32.

    Places [T] -> [2, T, K], the same for every row; places [B, T] -> [2, B, 1, T, K].
    """
    angles = _angles(place, head_width, theta)
    angles = torch.cat((angles, angles), -1)
    rope = torch.stack((angles.cos(), angles.sin()))
    return rope if place.dim() == 1 else rope.unsqueeze(2)


def rotate(x_BHTK: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + K/2), LLaMA's and GPT-NeoX's pairing."""
    left, right = x_BHTK.chunk(2, -1)
    return x_BHTK * rope[0] + torch.cat((-right, left), -1) * rope[1]


def _angles(place: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=place.device)
    return place.float()[..., None] * theta ** (-steps / width)


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The initial fp32 value of a parameter, a function of (seed, name) alone: the same on every rank and ZeRO stage.

    Normal with `init_std`; norms are 1, biases 0. Matrices that write into the residual stream are, by `config.init`,
    `scaled` by 1/sqrt(2 layers) (Radford et al., GPT-2, 2019) or start at 0 (`zero_residual`: each block begins as the
    identity; Goyal et al., 2017, section 5.1; Zhang et al., Fixup, 2019).
    """
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = config.init_std
    if owner.endswith((".attention.out", ".ffn.down")):
        std *= {"scaled": 1 / math.sqrt(2 * config.layers), "zero_residual": 0.0}[config.init]
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs a token: 6 a matrix weight, and full attention's 12 x layers x width x seq_len.

    The output projection counts, the embedding look-up does not (Kaplan et al., 2020; Chowdhery et al., PaLM, 2022).
    """
    kv_width = (config.kv_heads or config.heads) * config.width // config.heads
    attention = config.width * (2 * config.width + 2 * kv_width)
    ffn = config.width * ffn_width(config) * (3 if config.activation in GATED else 2)
    weights = config.layers * (attention + ffn) + config.vocab_size * config.width
    return 6.0 * weights + 12.0 * config.layers * config.width * seq_len
