"""Run under torchrun by test_dist.py: how many sockets a rank holds when it trains and saves; each rank's as JSON.

torchrun --nproc-per-node 8 tests/dist/sockets_worker.py OUT.json
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch

from pretrain import dist
from pretrain.config import compose
from pretrain.dist import all_gather_tensor
from pretrain.engine.engine import Engine
from pretrain.engine.settings import deepspeed_config
from pretrain.guard import Guard
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows
from tests.models import SMALL, fill_engine, initial_values


def main(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    ranks = dist.from_environment()
    before = sockets()
    device = dist.start(ranks)
    background = dist.new_cpu_group()
    cfg = compose.compose("pretrain", [*SMALL, "deepspeed=zero1"])
    settings = deepspeed_config(cfg.deepspeed, ranks.world_size, 1, 1, 1.0, "fp32")
    built = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    fill_engine(built, initial_values(cfg.model))
    batch = dict.fromkeys(("inputs", "labels"), torch.ones(1, 8, dtype=torch.int64))
    for _ in range(2):
        all_gather_tensor(torch.zeros(4, dtype=torch.int64))
        built.step([batch], 8 * ranks.world_size, 1e-3)
        Guard(cfg.guard).agreed_now()
        dist.agree(lambda: None, background)
    dist.barrier()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = dist.all_gather_objects(
        {
            "sockets": sockets() - before,
            "groups": len(torch.distributed.distributed_c10d._world.pg_map),
            "raised": soft == hard,
        }
    )
    if ranks.is_main:
        out.write_text(json.dumps(found))
    dist.finish(0)


def sockets() -> int:
    """The sockets that this process has open."""
    return sum(
        os.path.islink(path) and os.readlink(path).startswith("socket:") for path in Path("/proc/self/fd").iterdir()
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
