"""safetensors files: tensors and parts of them read lazily, and files written one tensor at a time.

A file is eight bytes of length, a JSON header (name -> dtype, shape, place of the data) and the data. Memory is bounded
by the largest tensor both ways. Floating-point tensors come out as fp32, whatever they are stored in.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from pretrain.checkpoint.sections import Section, Writer
from pretrain.files import write_synced

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # a Hugging Face folder has one of them
READABLE = ("F32", "F16", "BF16")
WRITABLE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
DTYPES = {name: dtype for dtype, name in WRITABLE.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """A file that was written and is on the disk."""

    name: str
    bytes: int
    sections: list[Section]
    tensors: tuple[str, ...]


class TensorFile:
    """The tensors of one file, mapped into memory: what is not read costs nothing. `ValueError` for a damaged file."""

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing")
        try:
            self._file = safetensors.safe_open(self.path, framework="pt")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.path} is damaged or cut short ({error}): get the file again") from None
        self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the file says it: one of READABLE, or another."""
        return self._file.get_slice(name).get_dtype()

    def read(self, name: str) -> torch.Tensor:
        """A tensor in fp32. It may be the mapped file itself: not to be written to."""
        assert self.dtype(name) in READABLE, f"{self.path}: {name} is stored as {self.dtype(name)}"
        return self._file.get_tensor(name).float()

    def read_range(self, name: str, start: int, end: int) -> torch.Tensor:
        """[start, end) of a tensor's first dimension, as it is stored."""
        return self._file.get_slice(name)[start:end]

    def read_columns(self, name: str, start: int, end: int) -> torch.Tensor:
        """[start, end) of a matrix's columns, as it is stored."""
        return self._file.get_slice(name)[:, start:end]


class TensorFolder:
    """The tensors of a Hugging Face folder: `model.safetensors`, or shards and their index."""

    def __init__(self, folder: Path):
        self.files = [TensorFile(path) for path in _files_of(Path(folder))]
        self._home = {name: file for file in self.files for name in file.names}

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._home[name].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self._home[name].read(name)

    def read_range(self, name: str, start: int, end: int) -> torch.Tensor:
        return self._home[name].read_range(name, start, end)

    def read_columns(self, name: str, start: int, end: int) -> torch.Tensor:
        return self._home[name].read_columns(name, start, end)


def _files_of(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():  # both: transformers takes the single file too
        return [folder / SINGLE]
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map: get the file again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            tensor = next(key for key, file in listed.items() if file == name)
            raise ValueError(f"{index} names {name} (for {tensor}), which is not in {folder}: get the file too")
    return [folder / name for name in names]


def header_bytes(specs: Iterable[Spec]) -> bytes:
    """What a file begins with, before the data of these tensors, end to end; its size is a multiple of 8."""
    place, entries = 0, ['"__metadata__":{"format":"pt"}']
    for spec in specs:  # one by one: a whole header in one json.dumps would hold the GIL
        kind, shape, end = WRITABLE[spec.dtype], list(spec.shape), place + spec.bytes
        entry = f'{{"dtype":"{kind}","shape":{shape},"data_offsets":[{place},{end}]}}'
        entries.append(f"{json.dumps(spec.name)}:{entry}")
        place = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path, specs: list[Spec], read: Callable[[str], torch.Tensor], on_bytes: Callable[[int], object]
) -> Written:
    """Write `read(name)` of each spec in turn. `on_bytes` is told of what is written."""
    with open(path, "wb") as file:
        writer = Writer(file.fileno(), 0, on_bytes)
        writer.write(memoryview(header_bytes(specs)))
        for spec in specs:
            tensor = read(spec.name)
            assert tuple(tensor.shape) == spec.shape, f"{spec.name}: {tuple(tensor.shape)} is not {spec.shape}"
            flat = tensor.to(spec.dtype).reshape(-1).contiguous()
            writer.write(memoryview(flat.view(torch.uint8).numpy()))
            del tensor, flat  # before the next one is read
        sections = writer.finish()
    return Written(path.name, sections[-1].end, sections, tuple(spec.name for spec in specs))


def split(specs: Iterable[Spec], limit_bytes: int) -> list[list[Spec]]:
    """Cut a list of tensors into files of at most `limit_bytes`; a larger tensor has a file of its own."""
    parts: list[list[Spec]] = []
    size = 0
    for spec in specs:
        if not parts or size + spec.bytes > limit_bytes:
            parts.append([])
            size = 0
        parts[-1].append(spec)
        size += spec.bytes
    return parts


def write_folder(
    folder: Path, specs: list[Spec], read: Callable[[str], torch.Tensor], limit_bytes: int,
    on_bytes: Callable[[int], object],
) -> list[Written]:  # fmt: skip
    """Write tensors as a Hugging Face folder has them: one file, or shards of `limit_bytes` and their index."""
    parts = split(specs, limit_bytes)
    if len(parts) == 1:
        return [write_file(folder / SINGLE, specs, read, on_bytes)]
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    written = [write_file(folder / name, part, read, on_bytes) for name, part in zip(names, parts, strict=True)]
    index = {
        "metadata": {"total_size": sum(spec.bytes for spec in specs)},
        "weight_map": {name: file.name for file in written for name in file.tensors},
    }
    write_synced(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return written
