"""The memory of a training step before anything is allocated: what a rank holds at each ZeRO stage and precision.

Rajbhandari et al., "ZeRO", 2020, and what DeepSpeed adds to it as `deepspeed_config` sets it up: the copies that it
reduces, the buckets, what stage 3 gathers. README.md has the table; a test compares with engines that run.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config.checks import CHOICES
from pretrain.config.schema import ModelConfig
from pretrain.engine.settings import BUCKET
from pretrain.hardware import DTYPES
from pretrain.model.heads import build_model, parameter_shapes, trained_parameters
from pretrain.model.losses import loss_rows
from pretrain.model.output import ON_GPU
from pretrain.optim.optimizers import STATE_KINDS, algorithm_of

FP32 = 4  # bytes a number, of each moment too
WHOLE_BUCKET = 500_000_000  # elements that DeepSpeed's engine reduces at a time at stage 0 and at stage 1 in bf16
CHECKPOINTING = CHOICES["train.activation_checkpointing"]  # from what computes least to what keeps least
LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered, DeepSpeed's stage3_max_live_parameters


class Sizes(NamedTuple):
    """Parameters, how many of them learn, the numbers that an optimizer keeps of these, and those that updating the
    largest matrix takes besides.
    """

    parameters: int
    trained: int
    moments: int
    update: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank. `weights`, `optimizer` and `gradients` are there as long as a step lasts, and `extra` at its
    fullest moment: activations, buckets, copies, what is gathered.
    """

    weights: int
    gradients: int
    optimizer: int
    extra: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.extra


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch, besides weights and gradients: what a forward pass keeps for the backward pass, and the
    most that lives at any moment of both, the gradient just made included.
    """

    kept: int = 0
    most: int = 0


def footprint(
    sizes: Sizes, stage: int, ranks: int, precision: str, activations: Activations = Activations(),
    bucket: int = BUCKET,
) -> Footprint:  # fmt: skip
    """Of a step with gradients accumulated. `bucket`: DeepSpeed's reduce_bucket_size."""
    parameters, trained, moments, _ = sizes
    low = FP32 if precision == "fp32" else 2
    part, filled = -(-trained // ranks), min(bucket, trained)
    weights = low * (-(-parameters // ranks) if stage == 3 else parameters)
    copy = FP32 if stage or low < FP32 else 0  # the fp32 weights, where the model computes with others
    optimizer = copy * (part if stage else trained) + FP32 * (-(-moments // ranks) if stage else moments)
    update = (2 if precision == "bf16" else FP32) * sizes.update  # at the end of a step, when activations are gone
    if stage == 0:
        gradients, cast = low * trained, FP32 if low < FP32 else 0
        reduced = (low + cast) * min(trained, WHOLE_BUCKET)  # put end to end, and in bf16 as fp32
        extra = max(activations.most, reduced, cast * trained + update)
    elif stage == 1:
        gradients = FP32 * trained
        reduced = FP32 * (bucket + filled)
        if precision == "bf16":  # end to end, unless they are that already
            reduced = FP32 * trained if trained <= WHOLE_BUCKET else 0
        elif precision == "fp16":
            reduced = max(reduced, low * trained)  # of a micro-batch, beside the sum of all
        extra = max(activations.most, reduced, update)
    elif stage == 2:
        gradients = FP32 * part
        again = FP32 * part if low == FP32 else 0  # those of a micro-batch, beside the sum of all
        reduced = low if low == FP32 else low + FP32  # a bucket put end to end, and cast; two more are being filled
        extra = max(max(activations.kept, again) + 2 * low * bucket + reduced * filled, FP32 * part + update)
    else:
        gradients = FP32 * (part + bucket)
        gathered = low * min(parameters, LIVE)
        extra = max(activations.kept + gathered + FP32 * (filled + filled // ranks), FP32 * part + update)
    return Footprint(weights, gradients, optimizer, extra)


def counts(model: ModelConfig, optimizer: str, trainable: Callable[[str], bool] = lambda name: True) -> Sizes:
    """Of a model under the optimizer of that name."""
    shapes = parameter_shapes(model)
    parameters, trained, moments, update = sum(map(math.prod, shapes.values())), 0, 0, 0
    for name in filter(trainable, trained_parameters(model)):
        shape, algorithm = shapes[name], algorithm_of(optimizer, name, shapes[name])
        trained += math.prod(shape)
        moments += math.prod(shape) * len(STATE_KINDS[algorithm])
        if algorithm == "muon":  # a matrix, two iterates of it, and two products of its shorter side with itself
            update = max(update, 3 * math.prod(shape) + 2 * min(shape) ** 2)
    return Sizes(parameters, trained, moments, update)


@functools.cache
def activations(model: ModelConfig, rows: int, length: int, precision: str, checkpointing: str) -> Activations:
    """Of `rows` x `length` tokens, each of them a target: measured on tensors without memory."""
    default = torch.get_default_dtype()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(DTYPES[precision])
            built = build_model(model, checkpointing)
            torch.set_default_dtype(default)
            for parameter in built.parameters():  # each gradient goes as soon as it is there, as under ZeRO
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
            tokens = torch.zeros(rows, length, dtype=torch.long)
            if model.head == "lm":
                built.head.sizes = ON_GPU  # the tensors say that they are on a CPU
            with Live(built.parameters()) as live:
                made = loss_rows(built, tokens, tokens).sum() if model.head == "lm" else built(tokens)
                kept = live.now
                made.backward(made.detach())
    finally:
        torch.set_default_dtype(default)
    return Activations(kept, live.most)


def fitting(
    model: ModelConfig, sizes: Sizes, ranks: int, card_bytes: int, length: int, precision: str,
    bucket: int = BUCKET,
) -> Iterator[dict]:  # fmt: skip
    """What fits a card of so many bytes: stage, checkpointing, and of each the largest micro-batch, a power of two."""
    for checkpointing in CHECKPOINTING:
        for stage in (1, 2, 3) if ranks > 1 else (1,):
            found = None
            for rows in (2**power for power in range(8)):
                measured = activations(model, rows, length, precision, checkpointing)
                needed = footprint(sizes, stage, ranks, precision, measured, bucket).peak
                if needed > card_bytes:
                    break
                found = {"stage": stage, "micro_batch_size": rows, "activation_checkpointing": checkpointing,
                         "bytes": needed, "left": card_bytes - needed}  # fmt: skip
            if found:
                yield found


def check_fits(sizes: Sizes, stage: int, ranks: int, precision: str, card_bytes: int, bucket: int = BUCKET) -> None:
    """`ValueError` where weights, gradients and optimizer alone are more than a card holds, with what fits it."""
    needed = footprint(sizes, stage, ranks, precision, bucket=bucket).peak
    if needed <= card_bytes:
        return
    others = [f"deepspeed=zero{other} ({size / 1e9:.1f} GB)" for other in (1, 2, 3)
              if (size := footprint(sizes, other, ranks, precision, bucket=bucket).peak) <= card_bytes]  # fmt: skip
    advice = f"take {' or '.join(others)}" if others else "no stage fits: take more GPUs or a smaller model"
    raise ValueError(
        f"deepspeed=zero{stage} in {precision} needs {needed / 1e9:.1f} GB on each of {ranks} ranks before any "
        f"activation, and the card has {card_bytes / 1e9:.1f} GB: {advice} (tools/show_model.py --fit says which "
        "micro-batches fit)"
    )


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, of those that appear while it is entered: `now`, and `most`."""

    def __init__(self, known: Iterator[torch.Tensor] = ()):
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if size and place not in self._sizes:
            self._sizes[place] = size
            self.now += size
            weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.now -= self._sizes.pop(place)
