"""A committed checkpoint as it lies on the disk: its manifest, its verification, and any range of its parameters.

It is a folder `step-000001000` of one safetensors file a rank and a `manifest.json` that lists every fragment, its file
and each file's sha256. Nothing is pickled. One that holds weights only, such as an imported model, is where a new run
can start.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pretrain.checkpoint.tensors import TensorFile
from pretrain.files import sha256_of_file

FORMAT = 1
MANIFEST = "manifest.json"
NO_OPTIMIZER = "none"  # `Header.optimizer` of a checkpoint that holds weights only


@dataclass(frozen=True)
class Header:
    """What a checkpoint says besides its fragments. `state` is the stream's; `model` has its vocabulary filled in."""

    step: int
    optimizer: str
    optimizer_steps: int
    state: dict
    model: dict


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:09d}"


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return sorted(checkpoints.glob("step-*"), reverse=True)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, its own hash checked."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("manifest_sha256")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} cannot be read: {error}") from error
    if digest != _digest(manifest):
        raise ValueError(f"{checkpoint / MANIFEST} was changed after it was written")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{checkpoint} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def manifest_bytes(header: Header, shapes: dict[str, list[int]], files: list[dict]) -> bytes:
    """The manifest file: `shapes` of the parameters, and of each file `name`, `bytes`, `sha256` and `fragments`."""
    body = {"format": FORMAT, **asdict(header), "parameters": shapes, "files": files}
    return json.dumps({**body, "manifest_sha256": _digest(body)}, indent=1).encode()


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def fragment_key(name: str, kind: str, offset: int) -> str:
    """The name of a fragment's tensor in its file."""
    return f"{name}:{kind}:{offset}"


def verify_file(folder: Path, expected: dict) -> None:
    """Raise `ValueError` when a file is missing, short or changed."""
    if not expected["bytes"]:
        return
    path = folder / expected["name"]
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
    digest = sha256_of_file(path)
    if digest != expected["sha256"]:
        raise ValueError(f"{path} has sha256 {digest[:16]}..., the manifest says {expected['sha256'][:16]}...")


class Reader:
    """Ranges of parameters out of a checkpoint's files, whichever fragments hold them."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.manifest = checkpoint, read_manifest(checkpoint)
        self.header = Header(**{name: self.manifest[name] for name in Header.__dataclass_fields__})
        self.index: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self.open: dict[str, TensorFile] = {}
        for file in self.manifest["files"]:
            for name, kind, offset, numel in file["fragments"]:
                self.index.setdefault((name, kind), []).append((offset, numel, file["name"]))

    def fill(self, name: str, kind: str, offset: int, values: torch.Tensor) -> None:
        """values <- [offset, offset + numel) of the flat parameter."""
        end, filled = offset + values.numel(), 0
        for start, numel, file in self.index.get((name, kind), []):
            low, high = max(offset, start), min(end, start + numel)
            if low < high:
                piece = self._file(file).read_range(fragment_key(name, kind, start), low - start, high - start)
                values[low - offset : high - offset].copy_(piece)
                filled += high - low
        if filled != values.numel():
            raise ValueError(f"{self.checkpoint} holds {filled} of {values.numel()} numbers of {name} ({kind})")

    def _file(self, name: str) -> TensorFile:
        if name not in self.open:
            self.open[name] = TensorFile(self.checkpoint / name)
        return self.open[name]
