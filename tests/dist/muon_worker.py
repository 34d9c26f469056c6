"""Run under torchrun by test_muon.py: Muon at every stage beside the same algorithm unsharded, and from stage to stage.

torchrun --nproc-per-node 2 tests/dist/muon_worker.py CHECKPOINTS OUT.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from engine_worker import VOCAB, build, config_of, half, loss_rows, micro_batches

from pretrain import dist
from pretrain.checkpoint import load
from pretrain.checkpoint.manifest import Header
from pretrain.checkpoint.save import Checkpoints
from pretrain.engine.engine import Engine
from pretrain.optim import optimizers
from pretrain.optim.matrices import plan_of
from tests.models import filled_model

BATCH, LENGTH, LR, MOVED = 12, 24, 1e-2, 3
STEPS = {"fp32": 20, "bf16": 8}
TOKENS = torch.randint(0, VOCAB, (20, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
# A large eps, or AdamW would turn the rounding of the smallest gradients into steps as large as any.
EPS = 1e-4
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 9000, "stage3_param_persistence_threshold": 0}}


def main(folder: Path, out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    found = {"stages": {}, "moves": {}, "plans": {}}
    expected = {precision: unsharded(precision) for precision in ("fp32", "bf16")}
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            found["stages"][f"{precision}-{stage}"] = stepped(stage, precision, *expected[precision], ranks, device)
    found["stages"]["fp32-3-sub"] = stepped(3, "fp32", *expected["fp32"], ranks, device, SUB_GROUPS)
    for stage in range(4):
        found["plans"][str(stage)] = planned(stage, ranks, device)
        save(stage, folder / f"{ranks.world_size}-{stage}", ranks, device)
    for path in sorted(folder.iterdir()):  # those of earlier launches, on other ranks, too
        written_by, before = map(int, path.name.split("-"))
        for stage in {before if written_by == ranks.world_size else (before + 3) % 4, (before + written_by) % 4}:
            found["moves"][f"{path.name}-{stage}"] = go_on(stage, path, ranks, device)
    if ranks.world_size == 2:
        get_accelerator().is_fp16_supported = lambda: True
        found["half"] = {str(stage): half(stage, out.parent, ranks, device, "muon") for stage in (1, 2, 3)}
    if ranks.is_main:
        out.write_text(json.dumps(found))
    dist.finish(0)


def lr_scale(name: str) -> float:
    """As of layer-wise decay: a group of matrices for each block."""
    return 0.5 if name.startswith("trunk.blocks.0.") else 1.0


def built_of(stage: int, precision: str, ranks, device, extra=None) -> Engine:
    micro = BATCH // ranks.world_size // 2
    return build(
        stage, precision, micro, ranks, device, eps=EPS, part="muon", extra=extra, batch=BATCH, lr_scale=lr_scale
    )


def step(built: Engine, number: int, ranks) -> float:
    parts = micro_batches({"inputs": TOKENS[number, :, :-1], "labels": TOKENS[number, :, 1:]}, built.micro, ranks)
    return built.step(parts, BATCH * LENGTH, LR).read()[0]


def unsharded(precision: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses after all steps of a model in fp32 by torch alone, with Newton-Schulz in a precision."""
    cfg, losses = config_of(0, "muon"), []
    model = filled_model(cfg.model)
    optimizer = optimizers.build(replace(cfg.optim, eps=EPS), model.named_parameters(), lr_scale)
    if precision == "bf16":
        optimizer.arrange([], 0, 1, dtype=torch.bfloat16)
    for group in optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    for rows in TOKENS[: STEPS[precision]]:
        optimizer.zero_grad()
        loss = loss_rows(model, rows[:, :-1], rows[:, 1:]).sum() / (BATCH * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def stepped(stage: int, precision: str, weights: dict, losses: list, ranks, device, extra=None) -> dict:
    """The largest difference of a weight after all steps, and the losses."""
    built = built_of(stage, precision, ranks, device, extra)
    found = [step(built, number, ranks) for number in range(STEPS[precision])]
    worst = [(f.values - weights[f.name].view(-1)[f.offset : f.offset + len(f.values)]).abs().max().item()
             for f in built.layout.fragments() if f.kind == "weight"]  # fmt: skip
    kinds = {f"{f.name}:{f.kind}" for f in built.layout.fragments()}
    everyones = dist.all_gather_objects([max(worst, default=0.0), sorted(kinds)])
    return {"losses": found, "expected": losses, "worst": max(worst for worst, _ in everyones),
            "kinds": sorted({kind for _, kinds in everyones for kind in kinds}),
            "steps": built.layout.optimizer_steps, "class": type(built.layout.optimizer).__name__}  # fmt: skip


def planned(stage: int, ranks, device) -> dict:
    """Whether the pieces of matrices are the layout's fragments; of how many matrices pieces travel."""
    built = built_of(stage, "fp32", ranks, device)
    names = [
        name
        for name, parameter in built.parameters.items()
        if optimizers.algorithm_of("muon", name, getattr(parameter, "ds_shape", parameter.shape)) == "muon"
    ]
    fragments = {f.name: f.values for f in built.layout.fragments() if f.kind == "weight"}
    matrices, same = built.layout.matrices(), True
    named = dict(zip(sorted(names, key=lambda name: (lr_scale(name), names.index(name))), matrices, strict=True))
    for name, matrix in named.items():
        piece = matrix.tensor.view(-1)[matrix.place : matrix.place + matrix.size(ranks.rank)]
        empty = name not in fragments and not len(piece)
        same &= empty or (fragments[name].data_ptr() == piece.data_ptr() and len(fragments[name]) == len(piece))
    cut = sum(
        matrix is not None for owned in plan_of(matrices, ranks.rank, ranks.world_size).rounds for matrix in owned
    )
    return {"same": all(dist.all_gather_objects(bool(same))), "cut": cut, "matrices": len(matrices)}


def save(stage: int, path: Path, ranks, device) -> None:
    built = built_of(stage, "fp32", ranks, device)
    for number in range(MOVED):
        step(built, number, ranks)
    saver = Checkpoints(path, ranks, 1, lambda kind, **facts: None)
    saver.save(Header(MOVED, "muon", built.layout.optimizer_steps, {}, {}), built.layout.fragments_to_save())
    assert saver.wait()
    rest = [step(built, number, ranks) for number in range(MOVED, 2 * MOVED)]
    if ranks.is_main:
        (path / "rest.json").write_text(json.dumps(rest))


def go_on(stage: int, path: Path, ranks, device) -> dict:
    """The losses of the steps after a checkpoint of another shape, and those of the run that wrote it."""
    built = built_of(stage, "fp32", ranks, device)
    header = load.fill(load.choose(path, ranks, lambda kind, **facts: None), built.layout.fragments())
    built.layout.refresh(header.optimizer_steps)
    losses = [step(built, number, ranks) for number in range(MOVED, 2 * MOVED)]
    return {"losses": losses, "expected": json.loads((path / "rest.json").read_text()),
            "steps": built.layout.optimizer_steps}  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
