"""Hidden states -> logits; or, with labels, at once the loss, its logits in pieces of positions and never whole.

Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024: a piece has its logits, their loss and its
gradient one after the other in one memory. Logits of all positions would be most of the memory of a step for a small
model with a large vocabulary, and gigabytes for a large one.

Shapes: B batch, T time, N positions (B x T, or those with a label), n of a piece, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pretrain.model.losses import IGNORED, wide


class Sizes(NamedTuple):
    """How many logits are in a piece, which a matrix product makes at once, and in a part of it, which softmax takes in
    fp32.
    """

    piece: int
    part: int


# On a CPU a part stays in the cache. Each piece adds to the gradient of the whole matrix, so they are not small.
ON_CPU, ON_GPU = Sizes(12 << 20, 1 << 18), Sizes(1 << 28, 1 << 25)


class Asked(NamedTuple):
    """What is asked of the logits, besides the labels."""

    softcap: float
    z_loss: float
    sizes: Sizes


class Output(nn.Linear):
    """The output matrix [V, D], and what caps its logits."""

    def __init__(self, width: int, vocab_size: int, bias: bool, softcap: float):
        super().__init__(width, vocab_size, bias)
        self.softcap = softcap
        self.sizes: Sizes | None = None  # None: those for the device it is on

    def forward(
        self, hidden: torch.Tensor, labels_BT: torch.Tensor | None = None, z_loss: float = 0.0, with_hits: bool = False
    ) -> torch.Tensor:
        """Without labels the logits. With them `hidden` is [B, T, D], or [n, D] of those positions that have one, and
        what comes is the summed -log p(label) of each row [B], in nats, in fp32 or better; labels of -100 do not count.
        `with_hits`, for evaluation, without a gradient: [B, 2], beside it how often the likeliest token is the label.

        `z_loss` times the squared log of the softmax's normaliser is added for each label, which keeps logits from
        drifting (Chowdhery et al., PaLM, 2022, section 5).
        """
        if labels_BT is None:
            logits = super().forward(hidden)
            return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        asked = Asked(self.softcap, z_loss, self.sizes or (ON_CPU if hidden.device.type == "cpu" else ON_GPU))
        at = labels_BT != IGNORED if hidden.dim() == 2 else None
        given = (hidden if hidden.dim() == 2 else hidden.flatten(0, 1), self.weight, self.bias)
        if torch.is_grad_enabled() and not with_hits:
            return _Loss.apply(*given, labels_BT, at, asked)
        with torch.no_grad():
            found = _judged(*given, _of(labels_BT, at), asked)
        losses_B, hits_B = (_sum_rows(values_N, labels_BT, at) for values_N in found)
        return torch.stack([losses_B, hits_B], 1) if with_hits else losses_B


class _Loss(torch.autograd.Function):
    """The summed loss of each row. The gradients of the sum of all rows are computed along with it, and in the backward
    pass only scaled, where the same is asked of every row; where it is not, they are computed again.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_BT, at, asked) -> torch.Tensor:
        given, labels_N = (hidden_ND, weight_VD, bias_V), _of(labels_BT, at)
        losses_N, ctx.gradients = _learnt(*given, labels_N, torch.ones_like(labels_N), asked, ctx.needs_input_grad)
        ctx.save_for_backward(*given, labels_BT, at)
        ctx.asked = asked
        return _sum_rows(losses_N, labels_BT, at)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_B: torch.Tensor) -> tuple:
        *given, labels_BT, at = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second backward pass finds none
        # Its strides tell that it is one number for all rows, as of `.sum()`: to compare them would wait for a GPU.
        if gradients is not None and (len(gradient_B) == 1 or gradient_B.stride(0) == 0):
            for gradient in filter(torch.is_tensor, gradients):
                gradient.mul_(gradient_B[0])  # a tensor of no dimension turns no other into its own type
        else:
            del gradients
            scales_N = _of(gradient_B[:, None].expand(labels_BT.shape), at)
            _, gradients = _learnt(*given, _of(labels_BT, at), scales_N, ctx.asked, ctx.needs_input_grad)
        both = zip(given, gradients, strict=True)
        return *(gradient if gradient is None else gradient.to(one.dtype) for one, gradient in both), None, None, None


def _learnt(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor,
    scales_N: torch.Tensor, asked: Asked, needed: tuple[bool, ...],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:  # fmt: skip
    """The loss of each position [N], and the gradients of hidden states, matrix and bias, those that are `needed`, of
    the losses times `scales_N`. What several pieces add to is in fp32.
    """
    losses_N = hidden_ND.new_empty(len(labels_N), dtype=wide(hidden_ND.dtype))
    scales_N = torch.where(labels_N == IGNORED, 0, scales_N).to(losses_N.dtype)
    of_hidden = torch.empty_like(hidden_ND) if needed[0] else None
    of_weight = of_bias = None
    buffers = _buffers(hidden_ND, weight_VD, asked)
    for piece, logits in _pieces(hidden_ND, weight_VD, bias_V, asked):
        parts = _parts(logits, labels_N[piece], losses_N[piece], buffers, asked)
        for soft, scales_n1 in zip(parts, scales_N[piece, None].split(buffers.shape[1]), strict=True):
            soft.source.copy_(_gradient(soft, scales_n1, asked))
        if needed[0]:
            torch.mm(logits, weight_VD, out=of_hidden[piece])
        if needed[1]:
            of_weight = _added(of_weight, logits.t() @ hidden_ND[piece])
        if needed[2]:
            of_bias = _added(of_bias, logits.sum(0, dtype=losses_N.dtype))
    if not len(labels_N):
        of_weight, of_bias = (torch.zeros_like(each) if need else None
                              for each, need in zip((weight_VD, bias_V), needed[1:3], strict=True))  # fmt: skip
    return losses_N, [of_hidden, of_weight, of_bias]


def _judged(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor, asked: Asked
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position the loss, and 1 where the likeliest token is the label: [N] and [N]."""
    found_2N = hidden_ND.new_empty((2, len(labels_N)), dtype=wide(hidden_ND.dtype))
    buffers = _buffers(hidden_ND, weight_VD, asked)
    for piece, logits in _pieces(hidden_ND, weight_VD, bias_V, asked):
        parts = _parts(logits, labels_N[piece], found_2N[0, piece], buffers, asked)
        likeliest = torch.cat([soft.logits.argmax(1) for soft in parts])
        found_2N[1, piece] = (likeliest == labels_N[piece]).to(found_2N.dtype)
    return found_2N[0], found_2N[1]


def _pieces(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, asked: Asked
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some positions after others, and their logits [n, V] before they are capped, always in the same memory."""
    at_once = max(1, min(asked.sizes.piece // len(weight_VD), len(hidden_ND)))
    memory_nV = hidden_ND.new_empty((at_once, len(weight_VD)))
    for start in range(0, len(hidden_ND), at_once):
        hidden_nD = hidden_ND[start : start + at_once]
        logits_nV = memory_nV[: len(hidden_nD)]
        if bias_V is None:
            torch.mm(hidden_nD, weight_VD.t(), out=logits_nV)
        else:
            torch.addmm(bias_V, hidden_nD, weight_VD.t(), out=logits_nV)
        yield slice(start, start + at_once), logits_nV


def _buffers(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, asked: Asked) -> torch.Tensor:
    """For a part's logits and probabilities, in fp32 (fp64 for fp64)."""
    at_once = max(1, min(asked.sizes.part // len(weight_VD), len(hidden_ND)))
    return hidden_ND.new_empty((2, at_once, len(weight_VD)), dtype=wide(hidden_ND.dtype))


class _Soft(NamedTuple):
    """Of a part, in buffers that the next one writes over."""

    source: torch.Tensor  # the part of the piece, before it was capped
    logits: torch.Tensor  # capped
    probabilities: torch.Tensor
    targets: torch.Tensor  # [n, 1], a token's where there is no label
    normalisers: torch.Tensor  # [n, 1], log of the sum of e^logits


def _parts(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, losses_N: torch.Tensor, buffers: torch.Tensor, asked: Asked
) -> Iterator[_Soft]:
    """The softmax of a piece, some positions after others. At the end `losses_N` are there, 0 without a label."""
    columns = (logits_NV, labels_N.clamp(min=0)[:, None], losses_N[:, None])
    for source, targets, losses in zip(*(column.split(buffers.shape[1]) for column in columns), strict=True):
        logits, probabilities = buffers if len(source) == buffers.shape[1] else buffers[:, : len(source)]
        logits.copy_(source)
        if asked.softcap:
            logits.div_(asked.softcap).tanh_().mul_(asked.softcap)
        torch.softmax(logits, 1, out=probabilities)
        # The likeliest token has the share 1 / sum(e^(logit - largest logit)), which never vanishes.
        normalisers = logits.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log_()
        torch.sub(normalisers, logits.gather(1, targets), out=losses)
        if asked.z_loss:
            losses.addcmul_(normalisers, normalisers, value=asked.z_loss)
        yield _Soft(source, logits, probabilities, targets, normalisers)
    losses_N.masked_fill_(labels_N == IGNORED, 0.0)


def _gradient(soft: _Soft, scales_n1: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Of the losses times `scales_n1`, with respect to the logits before they are capped [n, V]: softmax(logits) x
    (1 + 2 z log normaliser) - onehot(label), times 1 - (logit / softcap)^2. In the buffers of `soft`.
    """
    factors = scales_n1 * (1 + 2 * asked.z_loss * soft.normalisers) if asked.z_loss else scales_n1
    gradient = soft.probabilities.mul_(factors).scatter_add_(1, soft.targets, -scales_n1)
    if asked.softcap:
        slopes = soft.logits.div_(asked.softcap).square_().neg_().add_(1)
        gradient.mul_(slopes)
    return gradient


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total.to(wide(total.dtype)).add_(part)


def _of(values_BT: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """[N]: those of the positions `at`, or of all."""
    return values_BT.flatten() if at is None else values_BT[at]


def _sum_rows(values_N: torch.Tensor, labels_BT: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """[B] out of the values of the positions `at`, or of all. A sum over places, in an order that never varies."""
    if at is None:
        return values_N.view(labels_BT.shape).sum(1)
    return values_N.new_zeros(labels_BT.shape).masked_scatter(at, values_N).sum(1)
