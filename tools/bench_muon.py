"""python tools/bench_muon.py [--stages 0,1,2,3] [KEY=VALUE ...]

What Muon costs: steps of a model (the quickstart's, or that of KEY=VALUE) by AdamW and by Muon, in turn in one run, at
each ZeRO stage; under torchrun on several ranks. CPU time, the mean of the ranks; on a GPU the time it takes.

    torchrun --nproc-per-node 2 tools/bench_muon.py --stages 1,3
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pretrain import dist, hardware
from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import WEIGHT
from pretrain.engine.settings import deepspeed_config
from pretrain.model.heads import build_model
from pretrain.model.initial import fill_initial
from pretrain.model.losses import loss_rows

ROUNDS, ACCUMULATION = 9, 2
QUICKSTART = ["experiment=quickstart", "model.vocab_size=24576"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="another model, batch, ...")
    parser.add_argument("--stages", default="0,1,2,3", help="default: %(default)s")
    args = parser.parse_intermixed_args(argv)
    ranks = dist.from_environment()
    device = dist.start(ranks)
    for stage in args.stages.split(","):
        overrides = [*(args.overrides or QUICKSTART), f"deepspeed=zero{stage}"]
        steps = [step_of([*overrides, f"optim={name}"], ranks, device) for name in ("adamw", "muon")]
        rounds = [[seconds_of(step, device) for step in steps] for _ in range(ROUNDS + 2)][2:]
        adamw, muon = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(muon / adamw for adamw, muon in rounds)
        if ranks.is_main:
            found = f"adamw {adamw:.1f} ms, muon {muon:.1f} ms, ratio {ratio:.3f}"
            print(f"stage {stage}, {ranks.world_size} ranks: {found}", flush=True)
    dist.finish(0)


def step_of(overrides: list[str], ranks: dist.Ranks, device: torch.device) -> Callable[[], object]:
    """A step of a model with its initial weights; two micro-batches, but where stage 0 takes one."""
    cfg = compose.compose("pretrain", ["run.name=bench", *overrides])
    precision, stage = hardware.resolve_precision("auto", device), cfg.deepspeed.stage
    rows, parts = cfg.train.micro_batch_size, ACCUMULATION
    if stage == 0 and precision != "fp32":
        rows, parts = rows * parts, 1
    settings = deepspeed_config(cfg.deepspeed, rows * parts * ranks.world_size, rows, parts, 1.0, precision)
    engine = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    for each in engine.layout.fragments():
        if each.kind == WEIGHT:
            fill_initial(each.values, each.offset, each.name, each.shape, cfg.model, 0)
    engine.layout.refresh(0)
    tokens = torch.randint(0, cfg.model.vocab_size, (rows, cfg.train.seq_len), device=device)
    batch = [{"inputs": tokens, "labels": tokens}] * parts
    return lambda: engine.step(batch, tokens.numel() * parts * ranks.world_size, 1e-4).read()


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    dist.barrier()
    start = clock()
    step()
    return statistics.mean(dist.all_gather_objects(clock() - start))


if __name__ == "__main__":
    run_tool(main)
