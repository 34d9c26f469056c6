"""Run under torchrun by test_generate.py: text from models under DeepSpeed, between steps of training; results as JSON.

torchrun --nproc-per-node 2 tests/dist/generate_worker.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch

from pretrain import dist
from pretrain.config import compose
from pretrain.engine.engine import Engine
from pretrain.engine.settings import deepspeed_config
from pretrain.inference.generate import generate_batch
from pretrain.model.heads import build_model
from pretrain.model.losses import cross_entropy_rows
from tests.models import SMALL, fill_engine, initial_values

PROMPTS = ([[5, 6, 7], [8] * 20, [9, 10]], [[11] * 46], [])  # of the ranks: many steps, two steps, nothing to do
TOKENS = torch.randint(0, 97, (2, 2, 17), generator=torch.Generator().manual_seed(0))


def main(out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    results = {f"stage {stage}": run(stage, ranks, device) for stage in (0, 1, 3)}
    if ranks.is_main:
        out.write_text(json.dumps(results))
    dist.finish(0)


def run(stage: int, ranks: dist.Ranks, device: torch.device) -> dict:
    """Ids of every rank before and after a step, and the losses of two steps."""
    threshold = "+deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0"  # else small ones stay whole
    overrides = [*SMALL, f"deepspeed=zero{stage}", *([threshold] if stage == 3 else [])]
    cfg = compose.compose("pretrain", overrides)
    settings = deepspeed_config(cfg.deepspeed, 4, 2, 1, 1.0, "fp32")
    built = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    fill_engine(built, initial_values(cfg.model, 5))
    ids = [generate(built.engine, mine, ranks) for mine in (PROMPTS, PROMPTS[1:])]
    losses = [step(built, ranks)]
    ids.append(generate(built.engine, PROMPTS, ranks))
    losses.append(step(built, ranks))
    return {"ids": dist.all_gather_objects(ids), "losses": losses}


def step(built: Engine, ranks: dist.Ranks) -> float:
    tokens = TOKENS[ranks.rank]
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
    return built.step([batch], 2 * 2 * 16, 1e-2).read()[0]


def loss_rows(model, inputs, labels):
    return cross_entropy_rows(model(inputs), labels)


def generate(model: torch.nn.Module, prompts: tuple, ranks: dist.Ranks) -> list[list[int]]:
    model.eval()
    calls = []
    hook = model.module.trunk.embedding.register_forward_hook(lambda *_: calls.append(1))
    ids = generate_batch(model, prompts[ranks.rank], 12, all_done=lambda done: all(dist.all_gather_objects(done)))
    hook.remove()
    assert len(set(dist.all_gather_objects(len(calls)))) == 1, "ZeRO-3 needs all ranks to call it equally often"
    return ids


if __name__ == "__main__":
    main(Path(sys.argv[1]))
