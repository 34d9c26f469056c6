"""One Transformer trunk, causal or bidirectional, its parts chosen by name in the config.

Shapes: B batch, T time, D model width, H heads, G key/value heads, K head width, F feed-forward width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.schema import ModelConfig
from pretrain.model.attention import ATTENTION, Spans, bounds_of, near, same_document, why_masks
from pretrain.model.lora import linear
from pretrain.model.positions import begins_of_documents, places_in_documents, rotate, rotations, sinusoids

Mask = torch.Tensor | Spans | None

GATED = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al., "Primer", 2021
}


def ffn_width(config: ModelConfig) -> int:
    """`config.ffn_width`, or 4 x width; gated: 8/3 x width (as many parameters) rounded up to a multiple of 64."""
    if config.ffn_width:
        return config.ffn_width
    return -(-8 * config.width // 3 // 64) * 64 if config.activation in GATED else 4 * config.width


def head_width(config: ModelConfig) -> int:
    """`config.head_width`, or width / heads."""
    return config.head_width or config.width // config.heads


def kv_heads(config: ModelConfig) -> int:
    """`config.kv_heads`, or as many as heads."""
    return config.kv_heads or config.heads


def has_window(config: ModelConfig, layer: int) -> bool:
    """Whether attention of this layer sees its neighbourhood only."""
    return config.sliding_window > 0 and not (config.global_every and layer % config.global_every == 0)


def new_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


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

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only."""
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty((len(rows), *old.shape[1:]))
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)


class Attention(nn.Module):
    """Multi-head or grouped-query attention (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.head_width = head_width(config)
        inner, kv_inner = config.heads * self.head_width, kv_heads(config) * self.head_width
        self.q = linear(config, "q", config.width, inner, config.attention_bias)
        self.k = linear(config, "k", config.width, kv_inner, config.attention_bias)
        self.v = linear(config, "v", config.width, kv_inner, config.attention_bias)
        self.out = linear(config, "out", inner, config.width, config.attention_bias)
        self.q_norm = new_norm(config, self.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = new_norm(config, self.head_width) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: torch.Tensor, rope: torch.Tensor | None, cache: LayerCache | None, mask: Mask,
        of_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`of_tokens` [B, T, G x K] is added to the values."""

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        v_BTK = self.v(x_BTD) if of_tokens is None else self.v(x_BTD) + of_tokens
        q, k, v = self.q_norm(heads(self.q(x_BTD))), self.k_norm(heads(self.k(x_BTD))), heads(v_BTK)
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
        self.up = linear(config, "up", config.width, width, config.ffn_bias)
        gated = config.activation in GATED
        self.gate = linear(config, "gate", config.width, width, config.ffn_bias) if gated else None
        self.down = linear(config, "down", width, config.width, config.ffn_bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.down(GATED[self.activation](self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, normalised before (pre) or after (post)."""

    def __init__(self, config: ModelConfig, layer: int, recomputes_ffn: bool = False):
        super().__init__()
        self.recomputes_ffn = recomputes_ffn
        self.pre = config.norm_position == "pre"
        is_normal = self.pre and config.embedding_norm and layer == 0  # what comes in has just been normalised
        self.attention_norm = nn.Identity() if is_normal else new_norm(config, config.width)
        self.attention = Attention(config)
        self.ffn_norm, self.ffn = new_norm(config, config.width), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: torch.Tensor, rope: torch.Tensor | None, cache: LayerCache | None, mask: Mask,
        of_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        given = (rope, cache, mask, of_tokens)
        if self.pre:
            x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), *given))
        else:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD, *given)))
        if self.recomputes_ffn and torch.is_grad_enabled():
            return checkpoint(self._feed_forward, x_BTD, use_reentrant=False)
        return self._feed_forward(x_BTD)

    def _feed_forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.pre:
            return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))


class Transformer(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D].

    What `activation_checkpointing` names is not kept for the backward pass but computed again there (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016): none, ffn (the feed-forward layers), full (all of a block).

    The last `config.value_embeddings` blocks have tables, what each token adds to their values: capacity that costs no
    products (Zhou et al., "Value Residual Learning", 2024, brings the first layer's values to others; modded-nanogpt,
    2024, learns them by token).
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.config = config
        self.recomputes_blocks, recomputes_ffn = activation_checkpointing == "full", activation_checkpointing == "ffn"
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width) if config.positions == "learned" else None
        self.segments = nn.Embedding(config.segments, config.width) if config.segments else None
        self.embedding_norm = new_norm(config, config.width) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, recomputes_ffn) for layer in range(config.layers))
        self.norm = new_norm(config, config.width) if config.norm_position == "pre" else nn.Identity()
        inner = kv_heads(config) * head_width(config)
        with_table = range(config.layers - config.value_embeddings, config.layers)
        self.values = nn.ModuleDict({str(layer): nn.Embedding(config.vocab_size, inner) for layer in with_table})

    def forward(
        self, tokens_BT: torch.Tensor, cache: list[LayerCache] | None = None, documents_BS: torch.Tensor | None = None,
        segments_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`documents_BS` numbers the documents of each row (padding -1), of the places in the cache and then of these
        tokens: each is computed as if it stood alone. `segments_BT`: the kind of segment of each token, 0 where not
        given.
        """
        start = cache[0].length if cache else 0
        end = start + tokens_BT.shape[1]
        place = torch.arange(start, end, device=tokens_BT.device)
        if documents_BS is not None:
            assert documents_BS.shape[1] == end, "documents are of the cached places too"
            place = places_in_documents(documents_BS)[:, start:]
        x_BTD = self._embed(tokens_BT, place, segments_BT)
        ropes = self._ropes(place, x_BTD.dtype)
        if cache is None and self._takes_spans(x_BTD):
            masks = self._spans(tokens_BT, documents_BS)
        else:
            masks = self._masks(start, end, documents_BS, tokens_BT.device)
        for layer, block in enumerate(self.blocks):
            local = has_window(self.config, layer)
            of_tokens = self.values[str(layer)](tokens_BT) if str(layer) in self.values else None
            inputs = (x_BTD, ropes[local], cache[layer] if cache else None, masks[local], of_tokens)
            if self.recomputes_blocks and torch.is_grad_enabled():
                x_BTD = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BTD = block(*inputs)
        return self.norm(x_BTD)

    def _embed(self, tokens_BT: torch.Tensor, place: torch.Tensor, segments_BT: torch.Tensor | None) -> torch.Tensor:
        x_BTD = self.embedding(tokens_BT)
        if self.config.scaled_embeddings:
            x_BTD = x_BTD * self.config.width**0.5
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(place)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(place, self.config.width).to(x_BTD.dtype)
        if self.segments is not None:
            x_BTD = x_BTD + self.segments(torch.zeros_like(tokens_BT) if segments_BT is None else segments_BT)
        return self.dropout(self.embedding_norm(x_BTD))

    def _ropes(self, place: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rotations of the layers that see all, and of those with a window."""
        if self.config.positions != "rope":
            return None, None
        everywhere = rotations(place, head_width(self.config), self.config).to(dtype)
        if not self.config.local_rope_theta:
            return everywhere, everywhere
        return everywhere, rotations(place, head_width(self.config), self.config, local=True).to(dtype)

    def _masks(
        self, start: int, end: int, documents_BS: torch.Tensor | None, device: torch.device
    ) -> tuple[Mask, Mask]:
        """Masks of the layers that see all, and of those with a window; None where `causal` says enough.

        The queries are the places from `start` to `end`, the keys all before `end`.
        """
        full, window, causal = None, self.config.sliding_window, self.config.causal
        if documents_BS is not None:
            full = same_document(documents_BS, causal, start)
        if not self._is_local(end):
            return full, full
        local = near(end - start, end, window, causal, device)[None, None]
        return full, local if full is None else full & local

    def _takes_spans(self, x_BTD: torch.Tensor) -> bool:
        config, dropout = self.config, self.config.dropout if self.training else 0.0
        return config.attention == "sdpa" and not why_masks(x_BTD.device, x_BTD.dtype, head_width(config), dropout)

    def _spans(self, tokens_BT: torch.Tensor, documents_BT: torch.Tensor | None) -> tuple[Mask, Mask]:
        """The same as `_masks` in a few numbers. Those of documents are as many as there are: a GPU is waited for."""
        (rows, length), window, causal = tokens_BT.shape, self.config.sliding_window, self.config.causal
        is_local = self._is_local(length)
        if documents_BT is not None:
            bounds, longest = bounds_of(begins_of_documents(documents_BT))
        elif is_local:
            bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=tokens_BT.device)
            longest = length
        else:
            return None, None
        full = None if documents_BT is None else Spans(bounds, longest, (-1, 0 if causal else -1))
        reach = (window - 1, 0) if causal else (window // 2, window // 2)
        return full, Spans(bounds, longest, reach) if is_local else full

    def _is_local(self, length: int) -> bool:
        """Whether a window hides any of so many positions."""
        window = self.config.sliding_window
        return window > 0 and length > (window if self.config.causal else window // 2 + 1)

    def new_cache(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty key/value caches for `capacity` positions."""
        weight = self.embedding.weight
        shape = (batch, kv_heads(self.config), capacity, head_width(self.config))
        return [LayerCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.blocks]


def flops_per_token(config: ModelConfig, seq_len: int, predicted: float = 1.0, frozen: int = 0) -> float:
    """Forward and backward FLOPs a token: 6 a matrix weight (4 under LoRA, which has no gradient of it), and full
    attention's 12 x layers x width x seq_len. The `frozen` lowest layers have no backward pass: a third of that.

    The output projection counts, the embedding look-up does not (Kaplan et al., 2020; Chowdhery et al., PaLM, 2022).
    `predicted`: the share of the positions whose logits are computed. Sliding windows are counted as full attention.
    """
    inner = config.heads * head_width(config)
    attention, ffn = _weights(config)
    head = 0.0
    if config.head == "lm":
        head = predicted * config.width * (config.vocab_size + (config.width if config.head_transform else 0))
    a_weight, learning = 4.0 if config.lora_rank else 6.0, config.layers - frozen
    forward = frozen * (2.0 * (attention + ffn) + 4.0 * inner * seq_len)
    return forward + a_weight * (learning * (attention + ffn) + head) + 12.0 * learning * inner * seq_len


def recomputed_flops_per_token(config: ModelConfig, seq_len: int, activation_checkpointing: str) -> float:
    """What the backward pass computes again, on top of `flops_per_token`."""
    attention, ffn = _weights(config)
    again = {
        "none": 0.0,
        "ffn": 2.0 * ffn,
        "full": 2.0 * (attention + ffn) + 4.0 * config.heads * head_width(config) * seq_len,
    }
    return config.layers * again[activation_checkpointing]


def _weights(config: ModelConfig) -> tuple[int, int]:
    """How many a block's attention and its feed-forward have in matrices."""
    attention = 2 * config.width * head_width(config) * (config.heads + kv_heads(config))
    return attention, config.width * ffn_width(config) * (3 if config.activation in GATED else 2)
