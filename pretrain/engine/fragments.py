"""The walk over what a rank owns: fragments of the weights and of the optimizer's moments, one class a ZeRO layout.

A *fragment* is a flat piece of a parameter's fp32 weight or of one of its optimizer moments. Every ZeRO stage comes
down to a list of fragments a rank owns, as views into the memory that DeepSpeed trains on: initialising, saving and
loading are all a walk over that list.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch.nn import Parameter

from pretrain.optim.matrices import Matrix
from pretrain.optim.optimizers import STATE_KINDS, init_state

WEIGHT = "weight"
# A fp32 tensor that the torch optimizer steps, its parameter group, and the parameters that it has something of.
Stepped = tuple[torch.Tensor, dict, list[Parameter]]


@dataclass(frozen=True)
class Fragment:
    """`values` (1-D, a view that training uses) is [offset, offset + numel) of the flat parameter `name`.

    fp32; a weight that does not learn is kept in the precision it is computed with. `is_shared`: all ranks hold it.
    """

    name: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    values: torch.Tensor
    is_shared: bool = False


class Layout(ABC):
    """How a ZeRO stage lays out over the ranks what it trains. `optimizer` is DeepSpeed's, around torch's own."""

    def __init__(self, parameters: dict[str, Parameter], optimizer: Any, rank: int):
        self.parameters, self.optimizer, self.rank = parameters, optimizer, rank
        self.torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        self._states, self._kinds, self._tensors = {}, {}, {}
        for tensor, group, members in self.stepped():
            self._states[id(tensor)] = init_state(self.torch_optimizer, group["algorithm"], tensor)
            self._kinds |= {id(parameter): STATE_KINDS[group["algorithm"]] for parameter in members}
            self._tensors |= {id(parameter): tensor for parameter in members}

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank owns: together the ranks own every element exactly once, or each of them all of it."""
        for name, parameter in self.parameters.items():
            yield from (self.learning if parameter.requires_grad else self.frozen)(name, parameter)

    def fragments_to_save(self) -> Iterator[Fragment]:
        """The fragments of which this rank is the one to write: what all hold is rank 0's."""
        return (fragment for fragment in self.fragments() if self.rank == 0 or not fragment.is_shared)

    @property
    def optimizer_steps(self) -> int:
        """Updates the optimizer has counted, for its bias correction."""
        return int(next(iter(self._states.values()))["step"].item())

    @torch.no_grad()
    def refresh(self, optimizer_steps: int) -> None:
        """After the fragments were written to: bring the weights that the model computes with up to date."""
        for state in self._states.values():
            state["step"].fill_(float(optimizer_steps))
        self.refresh_weights()

    def matrices(self) -> list[Matrix]:
        """The matrices that Muon steps, on all ranks in the same order."""
        return [self.matrix(tensor, parameter) for tensor, group, members in self.stepped()
                for parameter in members if group["algorithm"] == "muon"]  # fmt: skip

    @abstractmethod
    def stepped(self) -> Iterator[Stepped]:
        """All that the torch optimizer steps."""

    @abstractmethod
    def matrix(self, tensor: torch.Tensor, parameter: Parameter) -> Matrix:
        """Where a parameter lies in the tensor that this rank steps, and in those of the others."""

    @abstractmethod
    def learning(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        """This rank's fragments of a parameter that learns: its weight and its moments."""

    def frozen(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        """This rank's fragments of a parameter that does not learn."""
        yield Fragment(name, WEIGHT, 0, tuple(parameter.shape), parameter.data.view(-1), is_shared=True)

    @abstractmethod
    def refresh_weights(self) -> None:
        """Copy the fp32 weights into those that the model computes with, where they are others."""


class Whole(Layout):
    """Stage 0 in fp32: DeepSpeed leaves the torch optimizer as it is, and every rank holds everything."""

    def stepped(self) -> Iterator[Stepped]:
        for group in self.torch_optimizer.param_groups:
            yield from ((parameter, group, [parameter]) for parameter in group["params"])

    def matrix(self, tensor: torch.Tensor, parameter: Parameter) -> Matrix:
        return Matrix(tensor, tuple(parameter.shape))

    def learning(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        full, shape = self._tensors[id(parameter)], tuple(parameter.shape)
        yield Fragment(name, WEIGHT, 0, shape, full.data.view(-1), is_shared=True)
        for kind in self._kinds[id(parameter)]:
            yield Fragment(name, kind, 0, shape, self._states[id(full)][kind].view(-1), is_shared=True)

    def refresh_weights(self) -> None:
        pass


class WholeWithCopies(Whole):
    """Stage 0 in bf16: every rank holds everything, the weights also as fp32 copies, which the optimizer steps."""

    def stepped(self) -> Iterator[Stepped]:
        for group, lows in zip(self.torch_optimizer.param_groups, self.optimizer.fp16_groups, strict=True):
            yield from ((full, group, [low]) for full, low in zip(group["params"], lows, strict=True))

    def refresh_weights(self) -> None:
        for full, _, [low] in self.stepped():
            low.data.copy_(full.data)


class Partitioned(Layout):
    """Stages 1 and 2: a group's parameters are one flat buffer, of which each rank steps one stretch."""

    def __init__(self, parameters: dict[str, Parameter], optimizer: Any, rank: int):
        super().__init__(parameters, optimizer, rank)
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def stepped(self) -> Iterator[Stepped]:
        names = "single_partition_of_fp32_groups", "bit16_groups"
        if not hasattr(self.optimizer, names[0]):  # stage 1 with bf16 weights and fp32 gradients
            names = "fp32_groups_flat_partition", "bf16_groups"
        flats, members = (getattr(self.optimizer, name) for name in names)
        yield from zip(flats, self.torch_optimizer.param_groups, members, strict=True)

    def matrix(self, tensor: torch.Tensor, parameter: Parameter) -> Matrix:
        # A parameter is a view into the buffer of its group, in which the ranks' stretches follow one another.
        start, width = parameter.storage_offset(), tensor.numel()
        return Matrix(tensor, tuple(parameter.shape), max(0, start - self.rank * width), start, width)

    def learning(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return
        offset, shape = mapping.lp_fragment_address.start, tuple(parameter.shape)
        yield Fragment(name, WEIGHT, offset, shape, mapping.get_hp_fragment().data)
        for kind in self._kinds[id(parameter)]:
            yield Fragment(name, kind, offset, shape, mapping.get_hp_fragment(kind))

    def refresh_weights(self) -> None:
        self.optimizer.update_lp_params()


class Sharded(Layout):
    """Stage 3: of every parameter each rank holds and steps one part of equal length, the last one padded."""

    def stepped(self) -> Iterator[Stepped]:
        flats, members = self.optimizer.fp32_partitioned_groups_flat, self.optimizer.fp16_groups
        for number, (flat, parameters) in enumerate(zip(flats, members, strict=True)):  # sub-groups, of a group's parts
            group = self.torch_optimizer.param_groups[self.optimizer.sub_group_to_group_id[number]]
            yield flat, group, parameters

    def matrix(self, tensor: torch.Tensor, parameter: Parameter) -> Matrix:
        place = safe_get_local_fp32_param(parameter).storage_offset() - tensor.storage_offset()
        return Matrix(tensor, tuple(parameter.ds_shape), place, 0, parameter.ds_tensor.ds_numel)

    def learning(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        offset, owned = self._part_of(parameter)
        if not owned:
            return
        shape = tuple(parameter.ds_shape)
        yield Fragment(name, WEIGHT, offset, shape, safe_get_local_fp32_param(parameter).data[:owned])
        for kind in self._kinds[id(parameter)]:
            yield Fragment(name, kind, offset, shape, safe_get_local_optimizer_state(parameter, kind)[:owned])

    def frozen(self, name: str, parameter: Parameter) -> Iterator[Fragment]:
        offset, owned = self._part_of(parameter)
        if owned:
            yield Fragment(name, WEIGHT, offset, tuple(parameter.ds_shape), parameter.ds_tensor.data[:owned])

    def refresh_weights(self) -> None:
        for parameter in self.parameters.values():  # the copies within a node (hpz) are gathered from the parts again
            parameter.ds_secondary_tensor = None
        persistent = self.optimizer.persistent_parameters  # small ones, that DeepSpeed keeps whole on each rank
        if persistent:
            persistent[0].partition(persistent)
        lows, fulls = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        for low, full in zip(lows, fulls, strict=True):
            low.data.copy_(full.data)
        if persistent:
            persistent[0].all_gather(persistent)

    def _part_of(self, parameter: Parameter) -> tuple[int, int]:
        """Where this rank's part of a flat parameter begins, and how long it is."""
        width = parameter.ds_tensor.ds_numel
        offset = self.rank * width
        return offset, max(0, min(width, parameter.ds_numel - offset))


def layout_of(stage: int, parameters: dict[str, Parameter], optimizer: Any, rank: int) -> Layout:
    """The layout that DeepSpeed has chosen for a ZeRO stage: `optimizer` is the one its engine returned."""
    whole = WholeWithCopies if hasattr(optimizer, "optimizer") else Whole
    layout = {0: whole, 1: Partitioned, 2: Partitioned, 3: Sharded}[stage]
    return layout(parameters, optimizer, rank)
