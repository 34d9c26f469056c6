"""Saving: fragments -> safetensors files in the background, the commit protocol, retention.

A visible checkpoint is complete: it is staged under another name, every rank agrees that its part is written, each file
is read back by another rank, and the folder is renamed last. An error on one rank ends the save on all of them, and the
last good checkpoint stays.
"""

import contextlib
import hashlib
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
    committed,
    fragment_key,
    manifest_bytes,
    step_folder,
    verify_file,
)
from pretrain.checkpoint.tensors import Spec, serialize, split, write_file
from pretrain.config.schema import ModelConfig
from pretrain.dist import Ranks, agree, all_gather_objects, new_cpu_group
from pretrain.engine.fragments import WEIGHT, Fragment
from pretrain.files import check_room, sync_folder, write_synced
from pretrain.model.heads import parameter_shapes

STAGING, DISCARDED = ".staging-", ".discarded-"
ATTEMPTS = 2
WEIGHTS_FILE_BYTES = 4 << 30  # of a checkpoint that holds weights only; its files are verified by the ranks in parallel


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

            error = agree(pack, self.group)
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
            if error := agree(stage, self.group):
                if self.ranks.is_main:
                    shutil.rmtree(staging, ignore_errors=True)
                return error
        return None

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
            with contextlib.suppress(OSError):
                os.rename(old, discarded)  # half deleted, it is no checkpoint
                shutil.rmtree(discarded, ignore_errors=True)


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
