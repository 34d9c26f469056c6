"""Run under torchrun by test_finetune.py: many fine-tuning runs, one after the other, in one process group.

torchrun --nproc-per-node 2 tests/dist/finetune_worker.py ASKED.json OUT.json

ASKED.json: {"runs": command lines to carry out, "unreported": others whose report nobody reads, "steps": {name: a
command line of which one step is taken}}. OUT.json: {name: {parameter: the largest change of one of its numbers}}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from pretrain import dist, entry, finetune, hardware
from pretrain.config import compose
from pretrain.engine.fragments import WEIGHT
from pretrain.loop import on_device, prepared
from pretrain.plan import Plan


def main(asked: dict, out: Path) -> None:
    hardware.peak_flops = lambda device, precision: (1e12, "not measured")  # it takes longer than these runs
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out.parent)
    ranks = dist.from_environment()
    device = dist.start(ranks)
    for overrides in asked["runs"]:
        entry.run(plan_of(overrides, ranks), ranks, device)[1]()
    entry.page.write_report = lambda folder: folder  # its curves take half of the time
    for overrides in asked["unreported"]:
        entry.run(plan_of(overrides, ranks), ranks, device)[1]()
    changes = {name: one_step(plan_of(line, ranks), ranks, device) for name, line in asked["steps"].items()}
    if ranks.is_main:
        out.write_text(json.dumps(changes))
    dist.finish(0)


def plan_of(overrides: list[str], ranks: dist.Ranks) -> Plan:
    sys.argv = [sys.argv[0], *overrides]
    return finetune.make_plan(compose.from_command_line("finetune", entry.model_of), ranks)


def one_step(plan: Plan, ranks: dist.Ranks, device: torch.device) -> dict[str, float]:
    """How far each parameter gets in the first step of a run on one rank."""
    trainer = entry.build_engine(plan, "fp32", ranks, device)
    entry.start_from(None, trainer, plan)
    before = {f.name: f.values.clone() for f in trainer.layout.fragments() if f.kind == WEIGHT}
    rows = plan.stream.rows(plan.stream.numbers(0))
    [batch] = prepared((each for each in [rows]), plan.collate, plan.config.train, 0)
    trainer.step([on_device(part, device) for part in batch.parts()], batch.targets, plan.config.optim.lr)
    after = {f.name: f.values for f in trainer.layout.fragments() if f.kind == WEIGHT}
    return {name: float((after[name] - value).abs().max()) for name, value in before.items()}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
