"""Run under torchrun by test_compiling.py: steps with compiled blocks beside the same with plain ones, results as JSON.

torchrun --nproc-per-node 2 tests/dist/compile_worker.py OUT.json
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from engine_worker import LABELS, TOKENS, build, micro_batches
from torch._dynamo.utils import counters

from pretrain import dist
from pretrain.engine.compiling import CACHE, compile_blocks
from pretrain.model.heads import build_model
from pretrain.stream.objectives import IGNORE

BACKEND = "aot_eager_decomp_partition"  # what inductor is given, computed by torch
CASES = [
    *((f"fp32-{stage}", stage, "fp32", "all", "none") for stage in range(4)),
    *((f"bf16-{stage}", stage, "bf16", "all", "ffn") for stage in (1, 2, 3)),
    *((f"fp32-{stage}-full", stage, "fp32", "all", "full") for stage in (1, 3)),
    *((f"fp32-{stage}-muon", stage, "fp32", "muon", "none") for stage in (1, 3)),
    ("fp32-1-lora", 1, "fp32", "lora", "none"),
]


def main(out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    os.environ[CACHE] = str(out.parent)
    cases = {}
    for name, *case in CASES if ranks.world_size > 1 else CASES[1:4:2]:
        cases[name] = [stepped(*case, compiles, ranks, device) for compiles in (False, True)]
    found = {"cases": cases}
    if ranks.world_size == 2:
        found["one"] = one_cannot(out.parent, ranks, device)
    if ranks.is_main:
        out.write_text(json.dumps(found))
    dist.finish(0)


def batches(engine, ranks):
    for number in (0, 1, 0, 1):
        rows = {"inputs": TOKENS[number, :, :-1], "labels": LABELS[number]}
        yield micro_batches(rows, engine.micro, ranks), int((LABELS[number] != IGNORE).sum())


def stepped(stage, precision, part, checkpointing, compiles, ranks, device) -> dict:
    models_of = functools.partial(build_model, activation_checkpointing=checkpointing)
    engine = build(stage, precision, 2, ranks, device, part=part, models_of=models_of, eps=1e-4, compiles=compiles)
    torch._dynamo.reset()
    counters.clear()
    problem, losses, norms = None, [], []
    if compiles:
        problem = compile_blocks(engine, next(batches(engine, ranks))[0], False, print, BACKEND)
    for parts, targets in batches(engine, ranks):
        loss, norm = engine.step(parts, targets, 1e-2).read()
        losses.append(loss)
        norms.append(norm)
    return {"losses": losses, "norms": norms, "problem": problem, "graphs": counters["stats"]["unique_graphs"]}


def one_cannot(folder, ranks, device) -> dict:
    """The folder for what rank 1 compiles is no folder."""
    del os.environ[CACHE]
    os.environ["HOME"] = str(folder / f"home-{ranks.rank}")
    (folder / f"home-{ranks.rank}/.cache/pretrain").mkdir(parents=True)
    if ranks.rank == 1:
        (folder / "elsewhere").mkdir()
        (folder / "home-1/.cache/pretrain/inductor").symlink_to(folder / "elsewhere")
    engine = build(1, "fp32", 2, ranks, device, compiles=True)
    torch._dynamo.reset()
    parts = next(batches(engine, ranks))[0]
    problem = compile_blocks(engine, parts, False, print, BACKEND)
    counters.clear()
    torch._dynamo.reset()
    engine.step(parts, 1, 1e-2).read()
    found = dist.all_gather_objects([problem, counters["stats"]["unique_graphs"]])
    return {"problems": [each[0] for each in found], "graphs": [each[1] for each in found]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
