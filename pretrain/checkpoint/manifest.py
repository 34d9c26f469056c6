"""A committed checkpoint as it lies on the disk: its manifest, its verification, and any range of its parameters.

It is a folder `step-000001000` of safetensors files, each filled by one or more ranks, and a `manifest.json`. That has
the parameters' shapes, and of each file its bytes, the sha256 of each of its sections, and the ranges of parameters in
it, the same for all kinds; which tensors they lie in says the header of the file itself. So whoever looks for a range
opens the files that have some of it. Nothing is pickled. A checkpoint that holds weights only, such as an imported one,
is where a new run can start.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from pretrain.checkpoint.placement import Held, held_by, merged
from pretrain.checkpoint.sections import Section, share_out, verify_section
from pretrain.checkpoint.tensors import TensorFile
from pretrain.dist import ALONE, Ranks

FORMAT = 2
MANIFEST = "manifest.json"
NO_OPTIMIZER = "none"  # `Header.optimizer` of a checkpoint that holds weights only
DIGEST = '{"manifest_sha256":"'  # a manifest's first line: this, the hash of all the other lines, and `",`


@dataclass(frozen=True)
class Header:
    """What a checkpoint says besides its fragments. `state` is the stream's; `model` has its vocabulary filled in."""

    step: int
    optimizer: str
    optimizer_steps: int
    state: dict
    model: dict
    loss_scale: dict = field(default_factory=dict)  # of fp16


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint. `ranges`: parameter -> [start, numel, start, numel, ...] of what it holds of it."""

    name: str
    bytes: int
    sections: list[Section]
    ranges: dict[str, list[int]]


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:09d}"


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(checkpoints.glob("step-*"), reverse=True)


def manifest_bytes(header: Header, shapes: dict[str, list[int]], files: list[SavedFile]) -> bytes:
    """The manifest file of parameters of these `shapes`: a line of its own hash, then a line a file."""
    numbers = {name: number for number, name in enumerate(shapes)}
    lines = []
    for file in files:  # one by one: all of them in one json.dumps would hold the GIL
        ranges = [[numbers[name], *flat] for name, flat in file.ranges.items()]
        entry = {"name": file.name, "bytes": file.bytes, "sections": file.sections, "ranges": ranges}
        lines.append(_dumped(entry))
    facts = _dumped({"format": FORMAT, **asdict(header), "parameters": shapes})
    text = facts[1:-1] + ',"files":[\n' + ",\n".join(lines) + "\n]}\n"
    return f'{DIGEST}{hashlib.sha256(text.encode()).hexdigest()}",\n{text}'.encode()


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, its own hash checked; one of an earlier format in the words of this one."""
    try:
        data = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(data)
        said = manifest.pop("manifest_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} cannot be read: {error}") from error
    first, _, text = data.partition(b"\n")
    if first != f'{DIGEST}{said}",'.encode():  # format 1: the hash is of the sorted keys
        text = json.dumps(manifest, sort_keys=True).encode()
    if said != hashlib.sha256(text).hexdigest():
        raise ValueError(f"{checkpoint / MANIFEST} was changed after it was written")
    if manifest["format"] not in (1, FORMAT):
        raise ValueError(f"{checkpoint} has format {manifest['format']}, this version reads 1 and {FORMAT}")
    names = list(manifest["parameters"])
    of_file = _file_1 if manifest["format"] == 1 else lambda found: _file_2(found, names)
    return manifest | {"files": [of_file(found) for found in manifest["files"]]}


def _file_2(found: dict, names: list[str]) -> SavedFile:
    sections = [Section(*section) for section in found["sections"]]
    ranges = {names[number]: flat for number, *flat in found["ranges"]}
    return SavedFile(found["name"], found["bytes"], sections, ranges)


def _file_1(found: dict) -> SavedFile:
    """A file of format 1, which had one rank's fragments, each listed, and one hash."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name, _, offset, numel in found["fragments"]:
        ranges.setdefault(name, []).append((offset, numel))
    whole = [Section(0, found["bytes"], found["sha256"])]
    return SavedFile(found["name"], found["bytes"], whole, {name: merged(those) for name, those in ranges.items()})


def _dumped(value: dict) -> str:
    return json.dumps(value, separators=(",", ":"))


class Reader:
    """A checkpoint that is open: its manifest, read once, and ranges of parameters out of its files."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.manifest = checkpoint, read_manifest(checkpoint)
        self.header = Header(
            **{name: self.manifest[name] for name in Header.__dataclass_fields__ if name in self.manifest}
        )
        self.files: list[SavedFile] = self.manifest["files"]
        self.index: dict[str, list[tuple[int, int, str]]] = {}  # parameter -> (start, numel, file)
        self.open: dict[str, tuple[TensorFile, dict[tuple[str, str], list[Held]]]] = {}
        for file in self.files:
            for name, flat in file.ranges.items():
                pairs = zip(flat[::2], flat[1::2], strict=True)
                self.index.setdefault(name, []).extend((start, numel, file.name) for start, numel in pairs)

    @property
    def name(self) -> str:
        return self.checkpoint.name

    def verify(self, ranks: Ranks = ALONE, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """Raise `ValueError` where a file that this rank has a share of is missing, short or changed. `on_bytes`: what
        was read.
        """
        for file, section in self.share_of(ranks):
            verify_section(self.checkpoint / file.name, file.bytes, section)
            on_bytes(section.end - section.start)

    def share_of(self, ranks: Ranks) -> list[tuple[SavedFile, Section]]:
        """The sections that a rank verifies: each is one rank's, and each rank has about as many bytes."""
        found = [(file, section) for file in self.files for section in file.sections]
        owners = share_out([section.end - section.start for _, section in found], ranks.world_size)
        return [each for each, owner in zip(found, owners, strict=True) if owner == ranks.rank]

    def fill(self, name: str, kind: str, offset: int, values: torch.Tensor) -> None:
        """values <- [offset, offset + numel) of the flat parameter."""
        filled = 0
        for file, key, start, end, place in self.pieces(name, kind, offset, values.numel()):
            values[place : place + end - start].copy_(file.read_range(key, start, end))
            filled += end - start
        if filled != values.numel():
            raise ValueError(f"{self.checkpoint} holds {filled} of {values.numel()} numbers of {name} ({kind})")

    def pieces(self, name: str, kind: str, offset: int, numel: int) -> Iterator[tuple[TensorFile, str, int, int, int]]:
        """What is saved of [offset, offset + numel): each (file, tensor, start and end in it, place in the range)."""
        end = offset + numel
        ranges = self.index.get(name, ())
        for file_name in dict.fromkeys(file for start, count, file in ranges if start < end and offset < start + count):
            file, holds = self._opened(file_name)
            for held in holds.get((name, kind), ()):
                low, high = max(offset, held.offset), min(end, held.offset + held.numel)
                if low < high:
                    start = held.start + low - held.offset
                    yield file, held.key, start, start + high - low, low - offset

    def close(self) -> None:
        """Let go of the files: the disk keeps what is mapped, though the checkpoint is removed."""
        self.open.clear()

    def _opened(self, name: str) -> tuple[TensorFile, dict[tuple[str, str], list[Held]]]:
        """A file, and what it holds of each parameter and kind."""
        if name not in self.open:
            file, holds = TensorFile(self.checkpoint / name), {}
            for key in file.names:
                for held in held_by(key, file.shape(key)[0]):
                    holds.setdefault((held.name, held.kind), []).append(held)
            self.open[name] = file, holds
        return self.open[name]
