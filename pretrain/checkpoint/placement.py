"""Where the ranks' fragments lie: which ranks fill a file together, its tensors, and the index of what a file holds.

All of it follows from what each rank owns. A rank's tensors lie together, its *part* of the file. A tensor holds the
fragments of one range of a parameter, one kind after the other, and its name says which: `NAME:KIND,KIND:OFFSET`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pretrain.checkpoint.tensors import DTYPES, WRITABLE, Spec, header_bytes

ALIGNMENT = 8  # bytes: parts begin at a multiple, so that each tensor can be mapped as it lies
PADDING = "__padding__"  # the name, before the rank, of what fills a part up to that


class Held(NamedTuple):
    """[offset, offset + numel) of a kind of a parameter: it is [start, start + numel) of the tensor `key`."""

    name: str
    kind: str
    offset: int
    numel: int
    key: str
    start: int


def tensor_key(name: str, kinds: Iterable[str], offset: int) -> str:
    return f"{name}:{','.join(kinds)}:{offset}"


def held_by(key: str, numel: int) -> list[Held]:
    """What a tensor of this name and size holds: the inverse of `tensor_key`."""
    if key.startswith(PADDING + ":"):
        return []
    name, kinds, offset = key.rsplit(":", 2)
    each = numel // (1 + kinds.count(","))
    return [Held(name, kind, int(offset), each, key, number * each) for number, kind in enumerate(kinds.split(","))]


@dataclass(frozen=True)
class Listing:
    """What a rank has to save: its tensors in order, and the shapes of the parameters that they are of."""

    tensors: list[Spec]
    shapes: dict[str, list[int]]

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.tensors)

    def to_json(self) -> dict:
        return {"tensors": [[spec.name, WRITABLE[spec.dtype], *spec.shape] for spec in self.tensors],
                "shapes": self.shapes}  # fmt: skip

    @classmethod
    def from_json(cls, found: dict) -> "Listing":
        return cls([Spec(name, DTYPES[dtype], (numel,)) for name, dtype, numel in found["tensors"]], found["shapes"])


@dataclass(frozen=True)
class Placed:
    """Where the parts of a save lie: the ranks of each file, the bytes that each rank writes, what this rank has to."""

    files: list[list[int]]
    stretches: dict[int, tuple[int, int]]
    header: bytes  # of the file whose first rank this is
    contents: list[dict]  # on rank 0: what `describe` says of each file

    def bytes_of(self, ranks: list[int]) -> int:
        return self.stretches[ranks[-1]][1]

    @property
    def bytes(self) -> int:
        return sum(map(self.bytes_of, self.files))

    def file_of(self, rank: int) -> int:
        return next(number for number, ranks in enumerate(self.files) if rank in ranks)


def padding(rank: int, size: int) -> list[Spec]:
    """What fills up `size` bytes to a multiple of `ALIGNMENT`: a tensor, since a file has no gaps."""
    return [Spec(f"{PADDING}:{rank}", torch.uint8, (-size % ALIGNMENT,))] if size % ALIGNMENT else []


def ranks_of_files(nodes: Sequence[int], sizes: Sequence[int], limit_bytes: int) -> list[list[int]]:
    """The ranks that fill each file, by every rank's node and bytes; who has none is in no file.

    The ranks of a node fill a file until the next one's part would pass `limit_bytes` (0: all fill one). Two nodes
    never write to one file: what one of them sees of the other's writing is up to a network file system.
    """
    files: list[list[int]] = []
    latest: dict[int, tuple[list[int], int]] = {}  # node -> (its last file, the bytes in it)
    for rank, (node, size) in enumerate(zip(nodes, sizes, strict=True)):
        if not size:
            continue
        ranks, filled = latest.get(node, ([], 0))
        if not ranks or (limit_bytes and filled + size > limit_bytes):
            ranks, filled = [], 0
            files.append(ranks)
        ranks.append(rank)
        latest[node] = ranks, filled + size
    return files


def stretches(files: list[list[int]], sizes: Sequence[int], headers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The bytes [start, end) of its file that each rank writes: the first one of a file its header and its part."""
    found = {}
    for ranks in files:
        place = 0
        for rank in ranks:
            found[rank] = place, place + headers[rank] + sizes[rank]
            place = found[rank][1]
    return found


def describe(listings: list[Listing]) -> tuple[bytes, dict]:
    """The header of the file that these ranks fill, and its content: the `ranges` and `shapes` of its parameters."""
    tensors = [spec for listing in listings for spec in listing.tensors]
    shapes = {name: shape for listing in listings for name, shape in listing.shapes.items()}
    return header_bytes(tensors), {"ranges": ranges_of((spec.name, spec.shape[0]) for spec in tensors),
                                   "shapes": shapes}  # fmt: skip


def file_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def ranges_of(tensors: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """The index of tensors, given by name and size: parameter -> [start, numel, start, numel, ...] of what there is.

    The ranges are the same for all kinds, or their union; neighbours are one range.
    """
    found: dict[str, set[tuple[int, int]]] = {}
    for key, numel in tensors:
        for held in held_by(key, numel):
            found.setdefault(held.name, set()).add((held.offset, held.numel))
    return {name: merged(ranges) for name, ranges in found.items()}


def merged(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """[start, numel, start, numel, ...] of the union of ranges given by start and numel."""
    flat: list[int] = []
    for start, numel in sorted(ranges):
        if flat and start <= flat[-2] + flat[-1]:
            flat[-1] = max(flat[-1], start + numel - flat[-2])
        else:
            flat += [start, numel]
    return flat
