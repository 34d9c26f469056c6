"""Saving: fragments -> safetensors files in the background, the commit protocol, retention.

A visible checkpoint is complete: it is staged under another name, every rank agrees that its part is written, each part
is read back by another rank, and the folder is renamed last. An error on one rank ends the save on all of them, and the
last good checkpoint stays.

Each rank writes its part of a file (`placement`) out of a copy of its fragments (`staging`). The first rank of a file
writes the header, for which the others tell it their tensors; it tells rank 0 which ranges the file holds.
"""

import contextlib
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
    SavedFile,
    committed,
    manifest_bytes,
    step_folder,
)
from pretrain.checkpoint.placement import (
    Listing,
    Placed,
    describe,
    file_name,
    ranges_of,
    ranks_of_files,
    stretches,
    tensor_key,
)
from pretrain.checkpoint.sections import Section, Writer, cut, verify_section
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.tensors import Spec, split, write_file
from pretrain.config.schema import ModelConfig
from pretrain.dist import Ranks, agree, all_gather_tensor, new_cpu_group, receive_json, send_json, this_node
from pretrain.engine.fragments import WEIGHT, Fragment
from pretrain.files import check_room, sync_folder, write_synced
from pretrain.model.heads import parameter_shapes

STAGING, DISCARDED = ".staging-", ".discarded-"
ATTEMPTS = 2
FILE_BYTES = 4 * 10**9  # where nobody says another number: of a file that ranks fill together, or of weights only


class SaveError(Exception):
    """A save has failed, on all ranks, for the reason that one of them met."""


class Checkpoints:
    """The checkpoints of a run. `save` returns once the fragments are copied; a thread writes and commits them.

    The ranks of a node write files of up to `file_bytes` together (0: one file); a rank's part is never cut.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int, on_event: Callable[..., None], file_bytes: int = FILE_BYTES
    ):
        self.folder, self.ranks, self.keep, self.on_event, self.file_bytes = folder, ranks, keep, on_event, file_bytes
        self.group, self.staging = new_cpu_group(), Staging(ranks.rank)
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
        listing = self.staging.fill(fragments)
        self.thread = threading.Thread(target=self._write_and_commit, args=(header, listing))
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

    def _write_and_commit(self, header: Header, listing: Listing) -> None:
        start, facts = time.perf_counter(), {}
        try:
            placed = self._place(listing)
            facts = {"megabytes": round(placed.bytes / 1e6, 1)}
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._attempt(header, placed, attempt)
                    agree(self._retire, self.group)  # all wait for it here, where there is time; it harms no save
                    break
                except SaveError as failure:
                    if attempt == ATTEMPTS:
                        facts = {"error": str(failure)}
        except Exception as failure:  # a rank is gone: training will end of it, and this says so first
            facts = {"error": f"{type(failure).__name__}: {failure}"}
        self.outcome = {"step": header.step, "seconds": round(time.perf_counter() - start, 3), **facts}

    def _agree(self, action: Callable[[], object]) -> None:
        """Run `action` on every rank; `SaveError` on all when it fails on one."""
        if error := agree(action, self.group):
            raise SaveError(error)

    def _place(self, listing: Listing) -> Placed:
        """Find out with the other ranks where each one's part lies; nothing is written yet."""
        rank, group = self.ranks.rank, self.group
        nodes, sizes = all_gather_tensor(torch.tensor([this_node(), listing.bytes]), group).T.tolist()
        files = ranks_of_files(nodes, sizes, self.file_bytes)
        (mine,) = [ranks for ranks in files if rank in ranks] or [[]]
        is_first, header, content = rank in mine[:1], b"", {}
        if is_first:
            listings = [listing, *(Listing.from_json(receive_json(other, group)) for other in mine[1:])]
        elif mine:
            send_json(listing.to_json(), mine[0], group)

        def describe_file() -> None:
            nonlocal header, content
            if is_first:
                header, content = describe(listings)

        self._agree(describe_file)
        headers = all_gather_tensor(torch.tensor([len(header)]), group).flatten().tolist()
        contents = []
        if self.ranks.is_main:
            contents = [receive_json(ranks[0], group) if ranks[0] else content for ranks in files]
        elif is_first:
            send_json(content, 0, group)
        return Placed(files, stretches(files, sizes, headers), header, contents)

    def _attempt(self, header: Header, placed: Placed, attempt: int) -> None:
        """Write, agree, read back, commit: into a new folder each time, so that nothing of a failed attempt is left.
        Every rank learns of an error on any; the last good checkpoint stays.
        """
        final = step_folder(self.folder, header.step)
        staging = final.with_name(f"{STAGING}{final.name}-{attempt}")
        written: list[Section] = []
        try:
            self._agree(lambda: self._prepare(staging, placed.bytes))
            self._agree(lambda: written.extend(self._write(staging, placed)))
            sections = self._gather(written, placed)
            self._agree(lambda: self._read_back(staging, placed, sections))
            self._agree(lambda: self._commit(staging, final, header, placed, sections))
        except SaveError:
            if self.ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _prepare(self, staging: Path, size: int) -> None:
        if not self.ranks.is_main:
            return
        check_room(self.folder, size, "the checkpoint")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()

    def _write(self, staging: Path, placed: Placed) -> list[Section]:
        """Write this rank's stretch of its file, beside the other ranks of the file; its sections."""
        if self.ranks.rank not in placed.stretches:
            return []
        path = staging / file_name(placed.file_of(self.ranks.rank))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # whoever comes first makes it
        try:
            writer = Writer(handle, placed.stretches[self.ranks.rank][0])
            writer.write(memoryview(placed.header))
            for block in self.staging.blocks:
                writer.write(memoryview(block.numpy()))
            return writer.finish()
        finally:
            os.close(handle)

    def _gather(self, written: list[Section], placed: Placed) -> dict[int, list[Section]]:
        """The sections of every rank: where they lie is known, their hashes are gathered."""
        places = {rank: cut(*stretch) for rank, stretch in placed.stretches.items()}
        digests = torch.zeros(max(map(len, places.values()), default=0), 32, dtype=torch.uint8)
        for number, section in enumerate(written):
            digests[number] = torch.frombuffer(bytearray.fromhex(section.sha256), dtype=torch.uint8)
        gathered = all_gather_tensor(digests, self.group).numpy()
        return {
            rank: [Section(*place, gathered[rank, number].tobytes().hex()) for number, place in enumerate(those)]
            for rank, those in places.items()
        }

    def _read_back(self, staging: Path, placed: Placed, sections: dict[int, list[Section]]) -> None:
        """Each rank reads the next rank's sections: what was meant is what another process sees."""
        following = (self.ranks.rank + 1) % self.ranks.world_size
        for section in sections.get(following, []):
            number = placed.file_of(following)
            verify_section(staging / file_name(number), placed.bytes_of(placed.files[number]), section)

    def _commit(
        self, staging: Path, final: Path, header: Header, placed: Placed, sections: dict[int, list[Section]]
    ) -> None:
        if self.ranks.is_main:
            _commit(staging, final, manifest_of(header, placed, sections))

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


def manifest_of(header: Header, placed: Placed, sections: dict[int, list[Section]]) -> bytes:
    """The manifest file of what all ranks have written, on rank 0."""
    shapes = {name: shape for content in placed.contents for name, shape in content["shapes"].items()}
    files = []
    for number, (ranks, content) in enumerate(zip(placed.files, placed.contents, strict=True)):
        found = [section for rank in ranks for section in sections[rank]]
        files.append(SavedFile(file_name(number), placed.bytes_of(ranks), found, content["ranges"]))
    return manifest_bytes(header, shapes, files)


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
    names = {tensor_key(name, [WEIGHT], 0): name for name in shapes}
    specs = [Spec(key, torch.float32, (torch.Size(shapes[name]).numel(),)) for key, name in names.items()]

    def read_flat(key: str) -> torch.Tensor:
        name = names[key]
        full = read(name)
        assert tuple(full.shape) == shapes[name], f"{name}: {tuple(full.shape)} is not {shapes[name]}"
        return full.reshape(-1)

    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        check_room(folder, sum(spec.bytes for spec in specs), "the checkpoint")
        files = []
        for number, part in enumerate(split(specs, FILE_BYTES)):
            file = write_file(staging / file_name(number), part, read_flat, on_bytes)
            for section in file.sections:
                verify_section(staging / file.name, file.bytes, section)
            ranges = ranges_of((spec.name, spec.shape[0]) for spec in part)
            files.append(SavedFile(file.name, file.bytes, file.sections, ranges))
        header = Header(0, NO_OPTIMIZER, 0, {}, asdict(model))
        _commit(staging, final, manifest_bytes(header, {name: list(shape) for name, shape in shapes.items()}, files))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _commit(staging: Path, final: Path, manifest: bytes) -> None:
    """Write the manifest of a staged checkpoint and make it visible."""
    write_synced(staging / MANIFEST, manifest)
    sync_folder(staging)
    os.rename(staging, final)
    sync_folder(final.parent)
