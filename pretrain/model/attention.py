"""softmax(Q K^T / sqrt(d_k)) V (Vaswani et al., "Attention Is All You Need", 2017, equation 1), by two routes.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), Q query positions, S key positions, K head width.
"""

import math

import torch
import torch.nn.functional as F


def visible(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """Causal mask [Q, S], True where a query may look: the queries are the last Q of the S positions."""
    full = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return full.tril(key_length - query_length)


def plain(q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, causal: bool, dropout: float):
    """The formula as written: the reference that the fast route is compared with."""
    groups = q_BHQK.shape[1] // k_BGSK.shape[1]
    k, v = k_BGSK.repeat_interleave(groups, 1), v_BGSK.repeat_interleave(groups, 1)
    scores_BHQS = q_BHQK @ k.transpose(-1, -2) / math.sqrt(q_BHQK.shape[-1])
    if causal:
        mask_QS = visible(q_BHQK.shape[2], k.shape[2], k.device)
        scores_BHQS = scores_BHQS.masked_fill(~mask_QS, float("-inf"))
    weights_BHQS = scores_BHQS.softmax(-1)
    return (F.dropout(weights_BHQS, dropout) if dropout else weights_BHQS) @ v


def sdpa(q_BHQK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSK: torch.Tensor, causal: bool, dropout: float):
    """PyTorch's fused kernels: flash attention where the device has it."""
    grouped = q_BHQK.shape[1] != k_BGSK.shape[1]
    query_length, key_length = q_BHQK.shape[2], k_BGSK.shape[2]
    mask = None
    if causal and 1 < query_length < key_length:  # the fused causal flag lines the queries up with the first keys
        mask, causal = visible(query_length, key_length, k_BGSK.device), False
    causal = causal and query_length > 1
    return F.scaled_dot_product_attention(q_BHQK, k_BGSK, v_BGSK, mask, dropout, causal, enable_gqa=grouped)


ATTENTION = {"sdpa": sdpa, "plain": plain}
