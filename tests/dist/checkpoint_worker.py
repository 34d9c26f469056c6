"""Run by test_checkpoint.py: saves, damages and loads checkpoints of made-up fragments; results as JSON.

torchrun --nproc-per-node 2 tests/dist/checkpoint_worker.py OUT.json
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain import dist
from pretrain.checkpoint import load, sections, staging
from pretrain.checkpoint.manifest import Header, Reader, committed
from pretrain.checkpoint.save import Checkpoints
from pretrain.engine.fragments import Fragment

SHAPES = {"a.weight": (7, 5), "b.weight": (11,), "c.weight": (2, 3, 4)}
KINDS = ("weight", "exp_avg")


def value(name: str, kind: str, step: int) -> torch.Tensor:
    """The whole flat tensor that a checkpoint of this step must hold."""
    numel = torch.Size(SHAPES[name]).numel()
    return torch.arange(numel, dtype=torch.float32) + 100 * step + 1000 * KINDS.index(kind) + len(name)


def fragments(step: int, cuts: list[float], part: int) -> list[Fragment]:
    """Part `part` of every tensor when each is cut at these fractions; step 0 gives zeros to load into."""
    found = []
    for name, shape in SHAPES.items():
        for kind in KINDS:
            full = value(name, kind, step) if step else torch.zeros(torch.Size(shape).numel())
            low, high = int(cuts[part] * len(full)), int(cuts[part + 1] * len(full))
            found.append(Fragment(name, kind, low, shape, full[low:high]))
    return found


def correct(loaded: list[Fragment], step: int) -> bool:
    return all(torch.equal(f.values, value(f.name, f.kind, step)[f.offset : f.offset + len(f.values)]) for f in loaded)


def header(step: int) -> Header:
    return Header(step, "adamw", step, {"samples": step}, {})


def main(out: Path) -> None:
    ranks = dist.from_environment()
    dist.start(ranks)
    results = {}
    events: list = []

    def on_event(kind, **facts):
        events.append([kind, facts])

    folder = out.parent / "checkpoints"
    if ranks.is_main:
        (folder / ".staging-step-000000009").mkdir(parents=True)
    dist.barrier()
    saver = Checkpoints(folder, ranks, 3, on_event)
    dist.barrier()
    results["leftovers"] = [path.name for path in folder.iterdir()]
    for step in (1, 2, 3, 4):
        saver.save(header(step), fragments(step, [0, 0.37, 1], ranks.rank))
        saver.wait()
    results["kept"] = [path.name for path in committed(folder)]
    results["resharded"] = all(reload(folder, cuts, ranks) for cuts in ([0, 0.5, 1], [0, 0.1, 1], [0, 0, 1], [0, 1, 1]))
    results["failed_rank"] = failing_rank(saver, ranks, events)
    results["opened"] = opened_on_resume(folder, ranks)
    results["memory"] = memory(out.parent / "memory", ranks)
    results["files"] = files_of(out.parent / "files", ranks)
    results["once"] = failing_once(out.parent / "once", ranks)
    results["changed"] = changing_what_was_written(out.parent / "changed", ranks)
    results["damage"] = {}
    for name in ("truncated", "flipped", "missing", "manifest", "no manifest"):
        results["damage"][name] = damage(folder, out.parent / name, ranks, name)
    if ranks.is_main:
        out.write_text(json.dumps(results))
    dist.finish(0)


def reload(folder: Path, cuts: list[float], ranks) -> bool:
    mine = fragments(0, cuts, ranks.rank)
    load.fill(Reader(committed(folder)[0]), mine)
    return all(dist.all_gather_objects(correct(mine, 4)))


def failing_rank(saver: Checkpoints, ranks, events: list) -> dict:
    """Rank 1 can write no file beyond 100 bytes: the save fails on both ranks, the next one succeeds."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    saver.save(header(5), fragments(5, [0, 0.37, 1], ranks.rank))
    committed = saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after_failure = sorted(path.name for path in saver.folder.iterdir())
    said = [event for event in events if event[0] == "save_failed"]
    saver.save(header(5), fragments(5, [0, 0.37, 1], ranks.rank))
    again = saver.wait()
    return {"committed": dist.all_gather_objects(committed), "after": after_failure,
            "said": dist.all_gather_objects(said), "again": dist.all_gather_objects(again)}  # fmt: skip


def opened_on_resume(folder: Path, ranks) -> tuple[list[list[str]], list[list[str]]]:
    """The files of checkpoints that each rank opens from the choice to the last number, and what it keeps mapped."""
    opened, is_on = [], True

    def hook(event: str, arguments: tuple) -> None:
        if is_on and event == "open" and str(folder) in str(arguments[0]):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(hook)
    chosen = load.choose(folder, ranks, lambda kind, **facts: None)
    load.fill(chosen, fragments(0, [0, 0.5, 1], ranks.rank))
    is_on = False
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return dist.all_gather_objects(opened), dist.all_gather_objects(mapped)


def memory(folder: Path, ranks) -> dict:
    """The most memory that two saves take, one after the other, over the bytes of the fragments."""
    values = torch.ones(24 * 2**20)
    found = {"bytes": values.nbytes, "taken": [], "left": [], "buffer": []}
    saver = Checkpoints(folder, ranks, 1, lambda kind, **facts: None)
    for step in (1, 2):
        before = resident(anew=True)
        saver.save(header(step), [Fragment(f"{ranks.rank}", "weight", 0, (len(values),), values)])
        assert saver.wait()
        found["taken"].append(resident("VmHWM") - before)
        found["left"].append(resident() - before)
        found["buffer"].append([block.data_ptr() for block in saver.staging.blocks])
    return {name: dist.all_gather_objects(value) for name, value in found.items()}


def resident(what: str = "VmRSS", anew: bool = False) -> int:
    """Bytes of memory of this process, or the most there were since this was asked for `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def files_of(folder: Path, ranks) -> dict:
    """Checkpoints in files of several kinds and many sections: what lies in each, and whether it loads."""
    found, hostname = {}, socket.gethostname
    usual = sections.SECTION_BYTES, staging.BLOCK_BYTES
    sections.SECTION_BYTES, staging.BLOCK_BYTES = 64, 16
    for case, file_bytes, cuts in (
        ("together", 4000, [0, 0.37, 1]), ("apart", 1, [0, 0.37, 1]), ("nodes", 0, [0, 0.37, 1]), ("one", 0, [0, 0, 1]),
    ):  # fmt: skip
        if case == "nodes":  # as it is on two machines
            socket.gethostname = lambda: f"host{ranks.rank}"
        saver = Checkpoints(folder / case, ranks, 1, lambda kind, **facts: None, file_bytes)
        saver.save(header(1), frozen(ranks.rank, 1) + fragments(1, cuts, ranks.rank))
        committed_ = saver.wait()
        socket.gethostname = hostname
        reader = load.choose(folder / case, ranks, lambda kind, **facts: None)
        mine = fragments(0, [0, 0.7, 1], ranks.rank)
        others = frozen(1 - ranks.rank, 0)
        load.fill(reader, mine + others)
        right = correct(mine, 1) and torch.equal(others[0].values, frozen(1 - ranks.rank, 1)[0].values)
        tensors = {file.name: sorted(load_file(folder / case / "step-000000001" / file.name)) for file in reader.files}
        found[case] = {"committed": committed_, "right": dist.all_gather_objects(right), "tensors": tensors,
                       "sections": [len(file.sections) for file in reader.files]}  # fmt: skip
    sections.SECTION_BYTES, staging.BLOCK_BYTES = usual
    return found


def frozen(rank: int, step: int) -> list[Fragment]:
    """A weight that does not learn, of an odd number of bytes: what follows it in a file is still aligned."""
    values = torch.full((3 + 2 * rank,), step, dtype=torch.bfloat16)
    return [Fragment(f"frozen.{rank}", "weight", 0, tuple(values.shape), values)]


def failing_once(folder: Path, ranks) -> dict:
    """Rank 1 cannot open its file at the first attempt: the second one begins with new files."""
    opened, is_on = [], True

    def hook(event: str, arguments: tuple) -> None:
        if is_on and event == "open" and "part-" in str(arguments[0]) and arguments[2] & os.O_WRONLY:
            opened.append(str(arguments[0]))
            if ranks.rank == 1 and len(opened) == 1:
                raise OSError("a disk that fails once")

    events: list = []
    saver = Checkpoints(folder, ranks, 1, lambda kind, **facts: events.append(kind))
    sys.addaudithook(hook)
    saver.save(header(1), fragments(1, [0, 0.37, 1], ranks.rank))
    committed_ = saver.wait()
    is_on = False
    loaded = fragments(0, [0, 0.5, 1], ranks.rank)
    load.fill(load.choose(folder, ranks, lambda kind, **facts: None), loaded)
    return {"committed": dist.all_gather_objects(committed_), "right": dist.all_gather_objects(correct(loaded, 1)),
            "events": events, "opened": dist.all_gather_objects(opened), "left": os.listdir(folder)}  # fmt: skip


def changing_what_was_written(folder: Path, ranks) -> dict:
    """A byte of rank 1's part changes before rank 0 reads it back."""
    is_on, events = True, []

    def hook(event: str, arguments: tuple) -> None:
        nonlocal is_on
        if is_on and ranks.is_main and event == "open" and "part-" in str(arguments[0]) and arguments[1] == "r":
            is_on = False
            with open(arguments[0], "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            is_on = True

    saver = Checkpoints(folder, ranks, 1, lambda kind, **facts: events.append([kind, facts]))
    sys.addaudithook(hook)
    saver.save(header(1), fragments(1, [0, 0.37, 1], ranks.rank))
    saver.wait()
    is_on = False
    return {"events": dist.all_gather_objects(events), "left": os.listdir(folder)}


def damage(source: Path, folder: Path, ranks, kind: str) -> dict:
    """Damage the newest of a copy of the checkpoints, and choose: what is chosen, said, and loaded."""
    events: list = []
    if ranks.is_main:
        shutil.copytree(source, folder)
        newest = committed(folder)[0]
        file = newest / ("manifest.json" if "manifest" in kind else "part-00000.safetensors")
        content = bytearray(file.read_bytes())
        if kind in ("missing", "no manifest"):
            file.unlink()
        elif kind == "truncated":
            file.write_bytes(content[:-3])
        elif kind == "flipped":
            content[-5] ^= 4
            file.write_bytes(content)
        else:
            file.write_text(file.read_text().replace('"samples":5', '"samples":6'))
    dist.barrier()
    chosen = load.choose(folder, ranks, lambda kind, **facts: events.append([kind, facts]))
    loaded = fragments(0, [0, 0.5, 1], ranks.rank)
    step = load.fill(chosen, loaded).step
    right = dist.all_gather_objects(correct(loaded, step))
    return {"chosen": chosen.name, "events": events, "right": right, "names": [path.name for path in folder.iterdir()]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
