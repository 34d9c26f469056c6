"""softmax(Q K^T / sqrt(d_k)) V (Vaswani et al., "Attention Is All You Need", 2017, equation 1), by two routes.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), Q query positions, S key positions, K head width.
A `mask` [B or 1, 1, Q, S], True where a query may look, says it all: it stands in the place of `causal`. So do `Spans`,
which say the same of documents and windows in a few numbers, where there is a kernel that takes them: a mask of 8,192
positions is 67 MB, and no flash attention takes any.
"""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not before torch 2.13
SPANS_ON = {"cuda": (torch.bfloat16, torch.float16)}  # which devices have a kernel for spans, and of what


class Spans(NamedTuple):
    """The positions of all rows, one row after the other, cut into spans that do not see each other."""

    bounds: torch.Tensor  # int32[n + 1]: where each begins, and the last one ends
    longest: int
    reach: tuple[int, int]  # how far a position sees back, and ahead; -1: as far as its span goes


def bounds_of(begins_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The bounds of spans, and how long the longest is, out of where a document begins (bool; each row does)."""
    starts = begins_BT.flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=begins_BT.numel())
    return bounds.to(torch.int32), int(bounds.diff().max())


def why_masks(device: torch.device, dtype: torch.dtype, head_width: int, dropout: float) -> str | None:
    """Why documents and windows need masks here; None where the kernel of torch.nn.attention.varlen takes their spans:
    flash attention (Dao, 2023).
    """
    if dtype not in SPANS_ON.get(device.type, ()):
        return f"{device.type} has no kernel without them for {str(dtype).removeprefix('torch.')}"
    if head_width % 8 or head_width > 256:
        return f"the kernel without them takes heads of 8, 16, ... 256 numbers, not of {head_width}"
    if dropout:
        return "the kernel without them knows no dropout"
    if not HAS_GROUPS:
        return f"torch {torch.__version__} is too old for a kernel without them: take 2.13"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for a kernel without them"
    return None


def in_spans(q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, spans: Spans) -> torch.Tensor:
    """As `sdpa`, without dropout. Queries and keys are of the same positions."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BGTK, v_BGTK))
    bounds, longest, reach = spans
    mixed = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=reach, enable_gqa=True)
    return mixed.unflatten(0, (q_BHTK.shape[0], -1)).transpose(1, 2)


def visible(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """Causal mask [Q, S], True where a query may look: the queries are the last Q of the S positions."""
    full = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return full.tril(key_length - query_length)


def near(query_length: int, key_length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """Mask [Q, S] of a sliding window, True where a query may look; the queries are the last Q of the S positions.

    Causal: itself and the `window` - 1 positions before it (Jiang et al., Mistral, 2023); otherwise `window` // 2 to
    each side (Beltagy et al., Longformer, 2020; Warner et al., ModernBERT, 2024).
    """
    keys = torch.arange(key_length, device=device)
    back = keys[key_length - query_length :, None] - keys
    return (back >= 0) & (back < window) if causal else back.abs() <= window // 2


def same_document(documents_BS: torch.Tensor, causal: bool, first: int = 0) -> torch.Tensor:
    """Mask [B, 1, Q, S] for rows of several documents: True within a document, when causal only up to the query.

    The queries are the positions from `first` on. Padding counts as one more document, so every query sees something
    and no softmax is empty.
    """
    mask_BQS = documents_BS[:, first:, None] == documents_BS[:, None, :]
    if causal:
        mask_BQS = mask_BQS & visible(mask_BQS.shape[1], mask_BQS.shape[2], documents_BS.device)
    return mask_BQS[:, None]


def plain(
    q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, causal: bool, dropout: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula as written: the reference that the fast route is compared with. The mask, -inf where a query may not
    look, is what products and scale are added to: in one pass, and in none of the backward pass.
    """
    groups = q_BHQK.shape[1] // k_BGSK.shape[1]
    k, v = k_BGSK.repeat_interleave(groups, 1), v_BGSK.repeat_interleave(groups, 1)
    if mask is None and causal:
        mask = visible(q_BHQK.shape[2], k.shape[2], k.device)
    q, keys, scale = q_BHQK.flatten(0, 1), k.flatten(0, 1).mT, 1 / math.sqrt(q_BHQK.shape[-1])
    hidden = q.new_zeros(()) if mask is None else q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    if hidden.dim() == 4:
        hidden = hidden.expand(q_BHQK.shape[:2] + hidden.shape[2:]).flatten(0, 1)
    scores_BHQS = torch.baddbmm(hidden, q, keys, alpha=scale).unflatten(0, q_BHQK.shape[:2])
    weights_BHQS = scores_BHQS.softmax(-1)
    return (F.dropout(weights_BHQS, dropout) if dropout else weights_BHQS) @ v


def sdpa(
    q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, causal: bool, dropout: float,
    mask: torch.Tensor | Spans | None = None,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's fused kernels: flash attention where the device has it, and no mask is given."""
    if isinstance(mask, Spans):
        return in_spans(q_BHQK, k_BGSK, v_BGSK, mask)
    grouped = q_BHQK.shape[1] != k_BGSK.shape[1]
    query_length, key_length = q_BHQK.shape[2], k_BGSK.shape[2]
    if mask is not None:
        causal = False
        if grouped:  # on a GPU no fused kernel but the slow formula takes both a mask and grouped heads
            groups, grouped = q_BHQK.shape[1] // k_BGSK.shape[1], False
            k_BGSK, v_BGSK = k_BGSK.repeat_interleave(groups, 1), v_BGSK.repeat_interleave(groups, 1)
    if causal and 1 < query_length < key_length:  # the fused causal flag lines the queries up with the first keys
        mask, causal = visible(query_length, key_length, k_BGSK.device), False
    if query_length == 1:  # it sees all; said so that a compiler of any length has a plain answer
        causal = False
    return F.scaled_dot_product_attention(q_BHQK, k_BGSK, v_BGSK, mask, dropout, causal, enable_gqa=grouped)


ATTENTION = {"sdpa": sdpa, "plain": plain}
