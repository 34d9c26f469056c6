"""Run under torchrun by test_show_model.py: the bytes that a rank's engine really holds, for each stage, as JSON.

torchrun --nproc-per-node 2 tests/dist/memory_worker.py fp32-0,bf16-3-muon KEY=VALUE ... OUT.json

The bytes are those of torch's tensors that live, each memory counted once, and beside them what the process has
resident: torch's profiler does not see what gloo's threads free.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from pretrain import dist
from pretrain.config import compose
from pretrain.engine.engine import Engine
from pretrain.engine.memory import Live
from pretrain.engine.settings import deepspeed_config
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows

ROWS, LENGTH = 1, 16
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def main(cases: str, *overrides: str, out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is not resident any more
    get_accelerator().is_fp16_supported = lambda: True  # slowly: torch computes it on any processor
    found = {}
    for case in cases.split(","):
        gc.collect()
        precision, stage, *optimizer = case.split("-")
        chosen = [f"deepspeed=zero{stage}", *(f"optim={name}" for name in optimizer)]
        found[case] = held(precision, stage, [*overrides, *chosen], ranks, device)
    everyones = dist.all_gather_objects(found)
    if ranks.is_main:
        out.write_text(json.dumps(everyones))
    dist.finish(0)


def held(precision: str, stage: str, overrides: list[str], ranks, device) -> dict:
    """Of two steps, of which the second finds everything in place: the bytes of weights, optimizer, and of all."""
    cfg = compose.compose("pretrain", ["run.name=x", *overrides])
    accumulation = 1 if (precision, stage) == ("bf16", "0") else 2
    settings = deepspeed_config(
        cfg.deepspeed, ROWS * accumulation * ranks.world_size, ROWS, accumulation, 1.0, precision
    )
    resident = resident_bytes()
    with Live() as live:
        built = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
        tokens = torch.ones(ROWS, LENGTH, dtype=torch.long)
        parts = [{"inputs": tokens, "labels": tokens}] * accumulation
        built.step(parts, tokens.numel() * accumulation, 1e-3)
        live.most = live.now
        Path("/proc/self/clear_refs").write_text("5")  # the most resident from here on
        built.step(parts, tokens.numel() * accumulation, 1e-3)
    parameters = [p.ds_tensor if stage == "3" else p for p in built.parameters.values()]
    weights = dict(map(storage, parameters))
    optimizer = dict(storage(fragment.values) for fragment in built.layout.fragments())
    return {
        "weights": sum(weights.values()), "peak": live.most, "resident": resident_bytes("VmHWM") - resident,
        "optimizer": sum(n for place, n in optimizer.items() if place not in weights),
        "class": type(built.layout.optimizer).__name__,
    }  # fmt: skip


def storage(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins, and its bytes; views of one memory have them in common."""
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def resident_bytes(kind: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main(*sys.argv[1:-1], out=Path(sys.argv[-1]))
