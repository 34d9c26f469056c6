"""Run by test_checkpoint.py: saves, damages and loads checkpoints of made-up fragments; results as JSON.

torchrun --nproc-per-node 2 tests/dist/checkpoint_worker.py OUT.json
"""

import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch

from pretrain import dist
from pretrain.checkpoint import load
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
