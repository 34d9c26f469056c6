"""Gradients of micro-batches added up in fp32 by DeepSpeed's optimizer for bf16, in fewer passes over memory."""

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine


def in_fewer_passes(engine: DeepSpeedEngine, optimizer: BF16_Optimizer, world_size: int) -> None:
    """DeepSpeed copies each gradient in fp32, adds that to its sum, and sets all sums to 0 after a step. Here a sum
    begins as its first gradient, and takes others in as they are: the same numbers. The average over one rank is what
    there is, for which DeepSpeed copies everything into one tensor and back.
    """
    of_all_ranks = optimizer.get_grads_for_reduction

    def add(weight: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        total, begun = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
        gradient = weight.grad.view(total.shape)
        if begun[index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        begun[index], weight._hp_grad = True, total

    def begin_anew() -> None:
        optimizer.fp32_groups_has_gradients = [[False] * len(begun) for begun in optimizer.fp32_groups_has_gradients]

    def complete() -> tuple:
        """What is to be averaged; 0 of a weight that had no part in this step here, but may have on another rank."""
        both = zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True)
        for totals, begun in both:
            for total, has_begun in zip(totals, begun, strict=True):
                if not has_begun:
                    total.zero_()
        return of_all_ranks()

    optimizer._update_hp_grad, optimizer.clear_hp_grads = add, begin_anew
    optimizer.get_grads_for_reduction = complete
    if world_size == 1:
        engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: complete()
