"""The copy that is saved: a rank's fragments in blocks of the host's memory, which are kept from save to save."""

import itertools
from collections.abc import Iterable

import torch

from pretrain.checkpoint.placement import Listing, padding, tensor_key
from pretrain.checkpoint.tensors import Spec
from pretrain.engine.fragments import Fragment

BLOCK_BYTES = 1 << 24  # torch makes pinned memory of a power of two: of one block, nearly twice what is needed


class Staging:
    """`fill` copies a rank's fragments; `blocks` are their bytes, in order, until the next `fill`."""

    def __init__(self, rank: int):
        self.rank = rank
        self.blocks: list[torch.Tensor] = []

    def fill(self, fragments: Iterable[Fragment]) -> Listing:
        """Copy the fragments, those of one range side by side; what was copied, in its order in `blocks`."""
        owned, listing = arranged(fragments, self.rank)
        on_gpu = any(fragment.values.is_cuda for fragment in owned)
        if sum(map(len, self.blocks)) != listing.bytes:
            sizes = (min(BLOCK_BYTES, listing.bytes - start) for start in range(0, listing.bytes, BLOCK_BYTES))
            self.blocks = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for size in sizes]
        place = 0
        for fragment in owned:
            data = fragment.values.detach().view(torch.uint8)
            while len(data):
                number, start = divmod(place, BLOCK_BYTES)
                part = data[: BLOCK_BYTES - start]
                self.blocks[number][start : start + len(part)].copy_(part, non_blocking=True)
                data, place = data[len(part) :], place + len(part)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return listing


def arranged(fragments: Iterable[Fragment], rank: int) -> tuple[list[Fragment], Listing]:
    """A rank's fragments in the order in which they are saved, and its tensors: one for all kinds of a range."""
    owned = (fragment for fragment in fragments if fragment.values.numel())
    ranges = [list(group) for _, group in itertools.groupby(owned, _range)]
    ranges.sort(key=lambda group: -group[0].values.dtype.itemsize)  # the wider first: then all are aligned
    tensors, shapes = [], {}
    for group in ranges:
        name, offset, numel, dtype = _range(group[0])
        key = tensor_key(name, [fragment.kind for fragment in group], offset)
        tensors.append(Spec(key, dtype, (len(group) * numel,)))
        shapes[name] = list(group[0].shape)
    tensors += padding(rank, sum(spec.bytes for spec in tensors))
    return [fragment for group in ranges for fragment in group], Listing(tensors, shapes)


def _range(fragment: Fragment) -> tuple:
    return fragment.name, fragment.offset, fragment.values.numel(), fragment.values.dtype
