"""Checkpoints: fragments <-> safetensors files, the commit protocol, verification, retention, the choice on resume.

A checkpoint is a folder `step-000001000` of one safetensors file a rank and a `manifest.json` that lists every
fragment, its file and each file's sha256. Any ZeRO stage at any number of ranks loads it: a rank fills the fragments it
owns from whichever saved ones overlap them. A visible folder is complete: it is staged under another name and renamed
last. Nothing is pickled. One that holds weights only, such as an imported model, is where a new run can start.
"""

import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from pretrain.checkpoint.manifest import (
    MANIFEST,
    NO_OPTIMIZER,
    Header,
    Reader,
    fragment_key,
    manifest_bytes,
    read_manifest,
    verify_file,
)
from pretrain.checkpoint.tensors import Spec, serialize, split, write_file
from pretrain.config.schema import ADDED_TO_MODELS, ModelConfig
from pretrain.dist import ALONE, Ranks, all_gather_objects, new_cpu_group
from pretrain.engine.fragments import WEIGHT, Fragment
from pretrain.files import RESULT, check_room, sync_folder, write_synced
from pretrain.model.heads import build_model, parameter_shapes
from pretrain.model.lora import adapted, merged, without_lora

STAGING, DISCARDED, BAD = ".staging-", ".discarded-", "bad-"
ATTEMPTS = 2
WEIGHTS_FILE_BYTES = 4 << 30  # of a checkpoint that holds weights only; its files are verified by the ranks in parallel


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
        self.best_step: int | None = None
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*folder.glob(STAGING + "*"), *folder.glob(DISCARDED + "*")]:
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, header: Header, fragments: Iterable[Fragment], best_step: int | None = None) -> None:
        """Copy the fragments and write them in the background, after the save before is done. On all ranks.

        The checkpoint of `best_step` is kept whatever its age.
        """
        self.wait()
        self.best_step = best_step
        owned = list(fragments)
        tensors = {fragment_key(f.name, f.kind, f.offset): f.values.detach().to("cpu", copy=True) for f in owned}
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

            def pack() -> None:
                nonlocal payload
                payload = serialize(tensors) if tensors else b""

            error = self._agree(pack)
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
        check_room(self.folder, size, "the checkpoint")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()

    def _read_back(self, staging: Path, files: list[dict]) -> None:
        """Each rank reads the next rank's file: what was meant is what another process sees."""
        verify_file(staging, files[(self.ranks.rank + 1) % self.ranks.world_size])

    def _commit(self, staging: Path, final: Path, header: Header, files: list[dict]) -> None:
        if not self.ranks.is_main:
            return
        shapes = {name: shape for file in files for name, shape in file["shapes"].items()}
        keys = ("name", "bytes", "sha256", "fragments")
        listed = [{key: file[key] for key in keys} for file in files if file["bytes"]]
        _commit(staging, final, header, shapes, listed)

    def _retire(self) -> None:
        """Remove all but the newest; what cannot be removed now is left, and harms no save."""
        if not self.ranks.is_main:
            return
        best = None if self.best_step is None else step_folder(self.folder, self.best_step)
        for old in committed(self.folder)[self.keep :]:
            if old == best:
                continue
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


def verify(checkpoint: Path, ranks: Ranks = ALONE, on_bytes: Callable[[int], object] = lambda count: None) -> None:
    """Raise `ValueError` when a file of this rank's share is missing, short or changed. `on_bytes`: what was read."""
    for file in read_manifest(checkpoint)["files"][ranks.rank :: ranks.world_size]:
        verify_file(checkpoint, file)
        on_bytes(file["bytes"])


def read_header(checkpoint: Path) -> Header:
    return Reader(checkpoint).header


def load(checkpoint: Path, fragments: Iterable[Fragment]) -> Header:
    """Fill the fragments from the overlapping saved ones, read lazily. `Engine.refresh` must follow."""
    reader = Reader(checkpoint)
    for fragment in fragments:
        if fragment.kind != WEIGHT and reader.header.optimizer == NO_OPTIMIZER:
            run = run_of(checkpoint)
            raise ValueError(f"{checkpoint} holds weights only, training cannot go on from it: start a new run with "
                             f"init={run} instead")  # fmt: skip
        shape = reader.manifest["parameters"].get(fragment.name)
        if shape != list(fragment.shape):
            raise ValueError(f"{checkpoint}: {fragment.name} has shape {shape}, the model {list(fragment.shape)}")
        reader.fill(fragment.name, fragment.kind, fragment.offset, fragment.values)
    return reader.header


def run_of(run_or_checkpoint: Path) -> Path:
    """The run's folder of a run or of one of its checkpoints."""
    path = Path(run_or_checkpoint)
    return path.parent.parent if (path / MANIFEST).exists() else path


def to_use(run_or_checkpoint: Path) -> Path:
    """The checkpoint that a run is used with: the best one where its result.json names one, else the newest. Of a
    checkpoint, itself.
    """
    path = Path(run_or_checkpoint)
    found = [path] if (path / MANIFEST).exists() else committed(path / "checkpoints")
    if not found:
        raise ValueError(f"no checkpoint in {path}: give a run's folder (runs/NAME) that has saved one")
    result = path / RESULT
    best = step_folder(path / "checkpoints", json.loads(result.read_text())["step"]) if result.is_file() else None
    return best if best in found else found[0]


class Weights:
    """The fp32 weights of a checkpoint, or of a run, whole or in parts, read when they are asked for.

    Of a model with LoRA they are those of the plain model that it amounts to.
    """

    def __init__(self, run_or_checkpoint: Path):
        self.checkpoint = to_use(run_or_checkpoint)
        self._reader = Reader(self.checkpoint)
        self.header = self._reader.header
        model = ADDED_TO_MODELS | self.header.model
        if differing := set(model) ^ set(ModelConfig.__dataclass_fields__):
            raise ValueError(f"{self.checkpoint} is of another version, whose models have other settings than this "
                             f"one's: {', '.join(sorted(differing))}")  # fmt: skip
        self._saved_config = ModelConfig(**model)
        self._saved_shapes = parameter_shapes(self._saved_config)
        self.config = without_lora(self._saved_config)
        self.shapes = parameter_shapes(self.config)
        saved = {name: tuple(shape) for name, shape in self._reader.manifest["parameters"].items()}
        both = {**self._saved_shapes, **saved}
        if wrong := [name for name in both if saved.get(name) != self._saved_shapes.get(name)]:
            shapes = self._saved_shapes
            listed = "; ".join(f"{name} has {saved.get(name)}, not {shapes.get(name)}" for name in wrong[:4])
            raise ValueError(f"{self.checkpoint}: {len(wrong)} shapes differing from its model's config: {listed}")

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter."""
        return merged(self._saved_config, name, self._read_saved)

    def read_range(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """[offset, offset + numel) of the flat parameter; without LoRA, nothing else of it is read."""
        if adapted(self._saved_config):
            return self.read(name).view(-1)[offset : offset + numel]
        return self._read_part(name, offset, numel)

    def _read_saved(self, name: str) -> torch.Tensor:
        shape = self._saved_shapes[name]
        return self._read_part(name, 0, torch.Size(shape).numel()).view(shape)

    def _read_part(self, name: str, offset: int, numel: int) -> torch.Tensor:
        values = torch.empty(numel, dtype=torch.float32)
        self._reader.fill(name, WEIGHT, offset, values)
        return values


def load_model(run_or_checkpoint: Path) -> torch.nn.Module:
    """The model of a checkpoint, or of a run's newest one, in fp32 on the CPU, ready to evaluate."""
    weights = Weights(run_or_checkpoint)
    verify(weights.checkpoint)
    return filled_model(weights.config, weights.read)


def filled_model(model: ModelConfig, read: Callable[[str], torch.Tensor]) -> torch.nn.Module:
    """A model with `read(name)` for each parameter, in fp32 on the CPU, ready to evaluate."""
    filled = build_model(model).eval().requires_grad_(False)
    for name, parameter in filled.named_parameters():
        parameter.copy_(read(name))
    return filled


def write_weights(
    run_folder: Path, model: ModelConfig, read: Callable[[str], torch.Tensor],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Path:  # fmt: skip
    """Commit a first checkpoint of a run's folder that holds weights only, `read(name)` of each parameter in turn.

    `on_bytes` is told of what is written. Whatever ends it early, nothing is left.
    """
    folder, shapes = Path(run_folder) / "checkpoints", parameter_shapes(model)
    final = step_folder(folder, 0)
    staging = final.with_name(STAGING + final.name)
    sizes = {fragment_key(name, WEIGHT, 0): (name, torch.Size(shape).numel()) for name, shape in shapes.items()}

    def read_flat(key: str) -> torch.Tensor:
        name = sizes[key][0]
        full = read(name)
        assert tuple(full.shape) == shapes[name], f"{name}: {tuple(full.shape)} is not {shapes[name]}"
        return full.reshape(-1)

    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        check_room(folder, sum(4 * numel for _, numel in sizes.values()), "the checkpoint")
        specs, files = [Spec(key, torch.float32, (numel,)) for key, (_, numel) in sizes.items()], []
        for number, part in enumerate(split(specs, WEIGHTS_FILE_BYTES)):
            file = write_file(staging / f"weights-{number:05d}.safetensors", part, read_flat, on_bytes)
            fragments = [[sizes[key][0], WEIGHT, 0, sizes[key][1]] for key in file.tensors]
            files.append({"name": file.name, "bytes": file.bytes, "sha256": file.sha256, "fragments": fragments})
            verify_file(staging, files[-1])
        header = Header(0, NO_OPTIMIZER, 0, {}, asdict(model))
        _commit(staging, final, header, {name: list(shape) for name, shape in shapes.items()}, files)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _commit(staging: Path, final: Path, header: Header, shapes: dict[str, list[int]], files: list[dict]) -> None:
    """Write the manifest of a staged checkpoint and make it visible."""
    write_synced(staging / MANIFEST, manifest_bytes(header, shapes, files))
    sync_folder(staging)
    os.rename(staging, final)
    sync_folder(final.parent)


def _error_of(action: Callable[[], None]) -> str | None:
    """None when `action()` succeeds, else the error in words, for the other ranks."""
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks must hear of it instead of waiting
        return f"{type(error).__name__}: {error}"
    return None
