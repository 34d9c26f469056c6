"""Checkpoints: fragments <-> safetensors files, the commit protocol, verification, retention, the choice on resume.

A checkpoint is a folder `step-000001000` of one safetensors file a rank and a `manifest.json` that lists every
fragment, its file and each file's sha256. Any ZeRO stage at any number of ranks loads it: a rank fills the fragments it
owns from whichever saved ones overlap them. A visible folder is complete: it is staged under another name and renamed
last. Nothing is pickled.
"""

import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from pretrain.config import ModelConfig
from pretrain.dist import ALONE, Ranks, all_gather_objects, new_cpu_group
from pretrain.engine import WEIGHT, Fragment
from pretrain.files import sha256_of_file, sync_folder, write_synced
from pretrain.model.heads import LanguageModel

FORMAT = 1
MANIFEST = "manifest.json"
STAGING, DISCARDED, BAD = ".staging-", ".discarded-", "bad-"
ATTEMPTS = 2


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


class Checkpoints:
    """The checkpoints of a run. `save` returns once the fragments are copied; a thread writes and commits them."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int, on_event: Callable[..., None]):
        self.folder, self.ranks, self.keep, self.on_event = folder, ranks, keep, on_event
        self.group = new_cpu_group()
        self.thread: threading.Thread | None = None
        self.outcome: dict | None = None
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(STAGING + "*"), *folder.glob(DISCARDED + "*")]:
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, header: Header, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments and write them in the background, after the save before is done. On all ranks."""
        self.wait()
        owned = list(fragments)
        tensors = {_key(f.name, f.kind, f.offset): f.values.detach().to("cpu", copy=True) for f in owned}
        listing = {
            "fragments": [[f.name, f.kind, f.offset, f.values.numel()] for f in owned],
            "shapes": {f.name: list(f.shape) for f in owned},
        }
        self.thread = threading.Thread(target=self._write_and_commit, args=(header, tensors, listing))
        self.thread.start()

    def poll(self) -> None:
        """Report a save that has ended since; never waits."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def wait(self) -> bool:
        """Wait for the save under way, report it, and say whether it was committed (True when there was none)."""
        if self.thread is None:
            return True
        self.thread.join()
        self.thread, outcome = None, self.outcome
        self.on_event("save_failed" if "error" in outcome else "saved", **outcome)
        return "error" not in outcome

    def _write_and_commit(self, header: Header, tensors: dict, listing: dict) -> None:
        start, size = time.perf_counter(), 0
        try:
            payload = b""

            def serialize() -> None:
                nonlocal payload
                payload = safetensors.torch.save(tensors) if tensors else b""

            error = self._agree(serialize)
            tensors.clear()
            if not error:
                file = f"rank-{self.ranks.rank:05d}.safetensors"
                mine = {"name": file, "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest(), **listing}
                files = all_gather_objects(mine, self.group)
                size = sum(file["bytes"] for file in files)
                for _ in range(ATTEMPTS):
                    if not (error := self._attempt(header, payload, files)):
                        self._retire()
                        break
        except Exception as failure:  # a rank is gone: training will end of it, and this says so first
            error = f"{type(failure).__name__}: {failure}"
        facts = {"error": error} if error else {"megabytes": round(size / 1e6, 1)}
        self.outcome = {"step": header.step, "seconds": round(time.perf_counter() - start, 3), **facts}

    def _attempt(self, header: Header, payload: bytes, files: list[dict]) -> str | None:
        """Write, agree, read back, commit. Every rank learns of an error on any; the last good checkpoint stays."""
        final = step_folder(self.folder, header.step)
        staging = final.with_name(STAGING + final.name)
        stages = (
            lambda: self._prepare(staging, sum(file["bytes"] for file in files)),
            lambda: write_synced(staging / files[self.ranks.rank]["name"], payload) if payload else None,
            lambda: self._read_back(staging, files),
            lambda: self._commit(staging, final, header, files),
        )
        for stage in stages:
            if error := self._agree(stage):
                if self.ranks.is_main:
                    shutil.rmtree(staging, ignore_errors=True)
                return error
        return None

    def _agree(self, action: Callable[[], None]) -> str | None:
        """Run `action` on every rank; the first error of any of them, the same on all, or None."""
        return next((error for error in all_gather_objects(_error_of(action), self.group) if error), None)

    def _prepare(self, staging: Path, size: int) -> None:
        if not self.ranks.is_main:
            return
        free = shutil.disk_usage(self.folder).free
        if free < size * 1.02 + 2**20:
            raise OSError(f"{self.folder} has {free / 1e9:.2f} GB free, the checkpoint needs {size / 1e9:.2f} GB")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()

    def _read_back(self, staging: Path, files: list[dict]) -> None:
        """Each rank reads the next rank's file: what was meant is what another process sees."""
        _verify_file(staging, files[(self.ranks.rank + 1) % self.ranks.world_size])

    def _commit(self, staging: Path, final: Path, header: Header, files: list[dict]) -> None:
        if not self.ranks.is_main:
            return
        shapes = {name: shape for file in files for name, shape in file["shapes"].items()}
        keys = ("name", "bytes", "sha256", "fragments")
        listed = [{key: file[key] for key in keys} for file in files if file["bytes"]]
        body = {"format": FORMAT, **asdict(header), "parameters": shapes, "files": listed}
        manifest = {**body, "manifest_sha256": _digest(body)}
        write_synced(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(staging)
        os.rename(staging, final)
        sync_folder(self.folder)

    def _retire(self) -> None:
        """Remove all but the newest; what cannot be removed now is left, and harms no save."""
        if not self.ranks.is_main:
            return
        for old in committed(self.folder)[self.keep :]:
            discarded = old.with_name(DISCARDED + old.name)
            if _error_of(functools.partial(os.rename, old, discarded)) is None:  # half deleted, it is no checkpoint
                shutil.rmtree(discarded, ignore_errors=True)


def choose(folder: Path, ranks: Ranks, on_event: Callable[..., None]) -> Path | None:
    """The newest checkpoint that verifies, the ranks sharing the reading. One that does not is renamed and reported."""
    for candidate in map(Path, all_gather_objects([str(path) for path in committed(folder)])[0]):
        errors = [e for e in all_gather_objects(_error_of(functools.partial(verify, candidate, ranks))) if e]
        if not errors:
            return candidate
        if ranks.is_main:
            bad = candidate.with_name(f"{BAD}{candidate.name}-{int(time.time())}")
            os.rename(candidate, bad)
            on_event("checkpoint_rejected", checkpoint=candidate.name, renamed_to=bad.name, reason=errors[0])
    return None


def verify(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Raise `ValueError` when a file of this rank's share is missing, short or changed."""
    for file in read_manifest(checkpoint)["files"][ranks.rank :: ranks.world_size]:
        _verify_file(checkpoint, file)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, its own hash checked."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        digest = manifest.pop("manifest_sha256")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} cannot be read: {error}") from error
    if digest != _digest(manifest):
        raise ValueError(f"{checkpoint / MANIFEST} was changed after it was written")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{checkpoint} has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def read_header(checkpoint: Path) -> Header:
    manifest = read_manifest(checkpoint)
    return Header(**{name: manifest[name] for name in Header.__dataclass_fields__})


def load(checkpoint: Path, fragments: Iterable[Fragment]) -> Header:
    """Fill the fragments from the overlapping saved ones, read lazily. `Engine.refresh` must follow."""
    reader = _Reader(checkpoint)
    for fragment in fragments:
        shape = reader.manifest["parameters"].get(fragment.name)
        if shape != list(fragment.shape):
            raise ValueError(f"{checkpoint}: {fragment.name} has shape {shape}, the model {list(fragment.shape)}")
        reader.fill(fragment.name, fragment.kind, fragment.offset, fragment.values)
    return read_header(checkpoint)


def weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full fp32 tensor) of each parameter, one at a time: memory is bounded by the largest."""
    reader = _Reader(checkpoint)
    for name, shape in reader.manifest["parameters"].items():
        full = torch.empty(shape, dtype=torch.float32)
        reader.fill(name, WEIGHT, 0, full.view(-1))
        yield name, full


def run_of(run_or_checkpoint: Path) -> Path:
    """The run's folder of a run or of one of its checkpoints."""
    path = Path(run_or_checkpoint)
    return path.parent.parent if (path / MANIFEST).exists() else path


def newest(run_or_checkpoint: Path) -> Path:
    """The newest checkpoint of a run, or the checkpoint that the path is."""
    path = Path(run_or_checkpoint)
    found = [path] if (path / MANIFEST).exists() else committed(path / "checkpoints")
    if not found:
        raise ValueError(f"no checkpoint in {path}: give a run's folder (runs/NAME) that has saved one")
    return found[0]


def load_model(run_or_checkpoint: Path) -> LanguageModel:
    """The model of a checkpoint, or of a run's newest one, in fp32 on the CPU, ready to evaluate."""
    path = newest(run_or_checkpoint)
    verify(path)
    model = LanguageModel(ModelConfig(**read_header(path).model)).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, full in weights(path):
        parameters[name].copy_(full)
    return model


class _Reader:
    """Ranges of parameters out of a checkpoint's files, whichever fragments hold them."""

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.manifest = checkpoint, read_manifest(checkpoint)
        self.index: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self.open: dict[str, safetensors.safe_open] = {}
        for file in self.manifest["files"]:
            for name, kind, offset, numel in file["fragments"]:
                self.index.setdefault((name, kind), []).append((offset, numel, file["name"]))

    def fill(self, name: str, kind: str, offset: int, values: torch.Tensor) -> None:
        """values <- [offset, offset + numel) of the flat parameter."""
        end, filled = offset + values.numel(), 0
        for start, numel, file in self.index.get((name, kind), []):
            low, high = max(offset, start), min(end, start + numel)
            if low < high:
                piece = self._file(file).get_slice(_key(name, kind, start))[low - start : high - start]
                values[low - offset : high - offset].copy_(piece)
                filled += high - low
        if filled != values.numel():
            raise ValueError(f"{self.checkpoint} holds {filled} of {values.numel()} numbers of {name} ({kind})")

    def _file(self, name: str) -> safetensors.safe_open:
        if name not in self.open:
            self.open[name] = safetensors.safe_open(self.checkpoint / name, framework="pt")
        return self.open[name]


def _key(name: str, kind: str, offset: int) -> str:
    """The name of a fragment's tensor in its file."""
    return f"{name}:{kind}:{offset}"


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _error_of(action: Callable[[], None]) -> str | None:
    """None when `action()` succeeds, else the error in words, for the other ranks."""
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks must hear of it instead of waiting
        return f"{type(error).__name__}: {error}"
    return None


def _verify_file(folder: Path, expected: dict) -> None:
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
