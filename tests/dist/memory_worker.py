"""Run under torchrun by test_show_model.py: the bytes that a rank's engine really holds, for each stage, as JSON.

torchrun --nproc-per-node 2 tests/dist/memory_worker.py OUT.json
"""

import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from pretrain import dist
from pretrain.config import compose
from pretrain.engine.engine import Engine
from pretrain.engine.settings import deepspeed_config
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows
from tests.models import fill_engine, initial_values

MODEL = ["model=llama_tiny", "model.layers=6", "model.vocab_size=64"]  # no parameter is much of it
BUCKETS = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}  # or they would be most of the memory


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")  # the garbage collector's list holds names that torch is giving up
    ranks = dist.from_environment()
    device = dist.start(ranks)
    found = {f"{precision}-{stage}": held(stage, precision, ranks, device)
             for precision in ("fp32", "bf16") for stage in range(4)}  # fmt: skip
    everyones = dist.all_gather_objects(found)
    if ranks.is_main:
        out.write_text(json.dumps(everyones))
    dist.finish(0)


def held(stage: int, precision: str, ranks, device) -> dict:
    """Bytes of weights and optimizer, and of all that lives when a backward pass is done, with gradients."""
    gc.collect()
    before = set(storages())
    cfg = compose.compose("pretrain", ["run.name=x", *MODEL, f"deepspeed=zero{stage}"])
    kept_whole = {"param_persistence_threshold": 0} if stage == 3 else {}
    config = replace(cfg.deepspeed, extra={"zero_optimization": BUCKETS | kept_whole} if stage else {})
    settings = deepspeed_config(config, 4 * ranks.world_size, 2, 2, 1.0, precision)
    built = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    fill_engine(built, initial_values(cfg.model))
    parts = [dict.fromkeys(("inputs", "labels"), torch.randint(0, 64, (2, 8))) for _ in range(2)]
    most = 0

    real_step = built.engine.step

    def step(*args, **kwargs):
        nonlocal most
        gc.collect()
        most = max(most, sum(size for place, size in storages().items() if place not in before))
        return real_step(*args, **kwargs)

    built.engine.step = step
    built.step(parts, 32, 1e-3)
    parameters = [p.ds_tensor if stage == 3 else p for p in built.parameters.values()]
    weights = dict(map(storage, parameters))
    optimizer = dict(storage(fragment.values) for fragment in built.layout.fragments())
    return {
        "weights": sum(weights.values()), "sum": most,
        "optimizer": sum(n for place, n in optimizer.items() if place not in weights),
    }  # fmt: skip


def storage(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins, and its bytes; views of one memory have them in common."""
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def storages() -> dict[int, int]:
    """The memory of all floating-point tensors that live, gradients included."""
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.is_floating_point() and item.device.type == "cpu":
            gradient = item.grad if item.is_leaf else None
            found |= dict(storage(tensor) for tensor in (item, gradient) if tensor is not None)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
