"""The copy that is saved: a rank's fragments in one buffer of the host's memory, which is kept from save to save."""

import itertools
from collections.abc import Iterable

import torch

from pretrain.checkpoint.placement import Listing, padding, tensor_key
from pretrain.checkpoint.tensors import Spec
from pretrain.engine.fragments import Fragment


class Staging:
    """`fill` copies a rank's fragments; `data` are their bytes until the next `fill`."""

    def __init__(self, rank: int):
        self.rank, self.buffer = rank, torch.empty(0, dtype=torch.uint8)

    @property
    def data(self) -> memoryview:
        return memoryview(self.buffer.numpy())

    def fill(self, fragments: Iterable[Fragment]) -> Listing:
        """Copy the fragments, those of one range side by side; what was copied, in its order in `data`."""
        owned, listing = arranged(fragments, self.rank)
        on_gpu = any(fragment.values.is_cuda for fragment in owned)
        self._reserve(listing.bytes, on_gpu)
        place = 0
        for fragment in owned:
            values = fragment.values.detach()
            self.buffer[place : place + values.nbytes].view(values.dtype).copy_(values, non_blocking=True)
            place += values.nbytes
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return listing

    def _reserve(self, size: int, on_gpu: bool) -> None:
        """Have a buffer of `size` bytes; the one there is, if it fits. A GPU copies to it at full speed."""
        if len(self.buffer) == size:
            return
        if self.buffer.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())
        self.buffer = torch.zeros(size, dtype=torch.uint8)
        if on_gpu and size:  # torch's own pinned memory is of a power of two: up to twice as much
            torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), size, 0)


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
