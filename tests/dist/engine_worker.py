"""Run under torchrun by test_engine.py: steps the engine in many set-ups in one process group, results as JSON.

torchrun --nproc-per-node 2 tests/dist/engine_worker.py OUT.json
"""

import functools
import gc
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import dist
from pretrain.checkpoint import load
from pretrain.checkpoint.manifest import Header
from pretrain.checkpoint.save import Checkpoints
from pretrain.config import compose
from pretrain.config.schema import Config, ModelConfig
from pretrain.config.steps import accumulation_steps
from pretrain.engine import engine
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import WEIGHT
from pretrain.engine.settings import deepspeed_config
from pretrain.model import losses
from pretrain.model.heads import build_model
from pretrain.model.initial import fill_initial
from pretrain.model.losses import cross_entropy_rows
from pretrain.model.output import Sizes
from pretrain.optim import optimizers
from pretrain.stream.objectives import IGNORE
from tests.models import filled_model, initial_values

VOCAB, BATCH, LENGTH = 211, 8, 24
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, VOCAB, (2, BATCH, LENGTH + 1), generator=GENERATOR)
LABELS = TOKENS[:, :, 1:].clone()
for _row in range(BATCH):  # rows with very different numbers of targets: a mean of means would show
    LABELS[:, _row, : 3 * _row] = IGNORE
# What learns of a model: all of it, thin matrices beside it, or its head alone.
PARTS = {"all": ([], lambda name: True), "lora": (["model.lora_rank=2"], lambda name: "lora_" in name),
         "head": (["model.tied_embeddings=false"], lambda name: name.startswith("head.")),
         "muon": (["optim=muon", "optim.adamw_lr_scale=0.5", "model.layers=2", "model.ffn_width=120"],
                  lambda name: True)}  # fmt: skip
DOCUMENTS = (torch.rand(2 * BATCH, LENGTH, generator=GENERATOR) < 0.2).cumsum(1)


def main(out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    kinds = ("stages", "splits", "moves", "counts", "few", "parts", "watched", "made")
    results = {kind: {} for kind in kinds}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            results["stages"][f"{precision}-{stage}"] = train(build(stage, precision, 2, ranks, device), ranks, 6)
            results["counts"][f"{precision}-{stage}"] = other_counts(stage, precision, ranks, device)
            results["few"][f"{precision}-{stage}"] = few_targets(stage, precision, ranks, device)
            results["watched"][f"{precision}-{stage}"] = watched(stage, precision, ranks, device)
            results["made"][f"{precision}-{stage}"] = made(stage, precision, ranks, device)
            for part in ("lora", "head") if precision == "fp32" else ("lora",):
                results["parts"][f"{part}-{precision}-{stage}"] = train_part(part, stage, precision, out, ranks, device)
    results["sums"] = sums(ranks, device)
    for micro in (m for m in (1, 2, 4, 8) if m * ranks.world_size <= BATCH):
        results["splits"][str(micro)] = gradient(micro, ranks, device)
    if ranks.world_size == 2:
        get_accelerator().is_fp16_supported = lambda: True  # slowly: torch computes it on any processor
        results["half"] = {str(stage): half(stage, out.parent, ranks, device) for stage in (1, 2, 3)}
        for before, after in ((1, 3), (3, 2), (2, 0), (0, 1)):
            results["moves"][f"{before}-{after}"], _ = move(before, after, out.parent, ranks, device)
    if ranks.is_main:
        out.write_text(json.dumps(results))
    dist.finish(0)


@functools.cache
def config_of(stage: int, part: str) -> Config:
    overrides = ["run.name=x", "model=llama_tiny", "model.layers=1", f"model.vocab_size={VOCAB}", "train.seq_len=24"]
    return compose.compose("pretrain", [*overrides, f"deepspeed=zero{stage}", *PARTS[part][0]])


def build(
    stage: int, precision: str, micro: int, ranks, device, clip=1.0, eps=1e-8, part="all", extra=None,
    models_of=build_model, batch=BATCH, lr_scale=lambda name: 1.0, compiles=False,
) -> Engine:  # fmt: skip
    cfg = config_of(stage, part)
    if is_in_one_go(stage, precision):
        micro = batch // ranks.world_size
    train_config = replace(cfg.train, global_batch_size=batch, micro_batch_size=micro)
    accumulation = accumulation_steps(train_config, ranks.world_size)
    deepspeed = replace(cfg.deepspeed, extra=extra or {})
    settings = deepspeed_config(deepspeed, batch, micro, accumulation, clip, precision)
    optim_config = replace(cfg.optim, grad_clip=clip, eps=eps)

    def new_model() -> torch.nn.Module:
        model = models_of(cfg.model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(PARTS[part][1](name))
        model.head.sizes = Sizes(30 * VOCAB, 7 * VOCAB)  # the logits of a micro-batch in several pieces
        return model

    built = Engine(new_model, losses.loss_rows, settings, optim_config, ranks, device, lr_scale, compiles)
    for f in built.layout.fragments():
        if f.kind == WEIGHT:
            fill_initial(f.values, f.offset, f.name, f.shape, cfg.model, 0)
    built.layout.refresh(0)
    built.micro, built.model_config, built.optim_config = micro, cfg.model, optim_config
    return built


def is_in_one_go(stage: int, precision: str) -> bool:
    """Stage 0 would add up the gradients of micro-batches in this precision."""
    return stage == 0 and precision != "fp32"


def loss_rows(model, inputs, labels, documents=None):
    """By torch, out of whole logits."""
    return cross_entropy_rows(model(inputs, documents=documents), labels)


def micro_batches(batch: dict[str, torch.Tensor], size: int, ranks) -> list[dict[str, torch.Tensor]]:
    """This rank's rows of a global batch."""
    mine = [part[ranks.rank :: ranks.world_size].split(size) for part in batch.values()]
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*mine, strict=True)]


def other_counts(stage: int, precision: str, ranks, device) -> dict:
    """Steps of 4, 2 and 8 micro-batches a rank on rows of several documents, and the same by torch alone."""
    # a large eps, or AdamW would turn the rounding of the smallest gradients into steps as large as any
    built = build(stage, precision, 2, ranks, device, eps=1e-4)
    everything = {"inputs": TOKENS[:, :, :-1].flatten(0, 1), "labels": LABELS.flatten(0, 1), "documents": DOCUMENTS}
    model = filled_model(built.model_config)
    torch_optimizer = optimizers.build(built.optim_config, model.named_parameters())
    found, expected = [], []
    for rows in (8, 4, 16):
        micro = (rows if is_in_one_go(stage, precision) else 2) // ranks.world_size
        batch = {name: part[:rows] for name, part in everything.items()}
        targets = int((batch["labels"] != IGNORE).sum())
        mine = micro_batches(batch, micro, ranks)
        found.append(built.step(mine, targets, 1e-2).read()[0])
        assert len(mine) == rows // ranks.world_size // micro
        for group in torch_optimizer.param_groups:
            group["lr"] = 1e-2
        torch_optimizer.zero_grad()
        loss = loss_rows(model, **batch).sum() / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), built.optim_config.grad_clip)
        torch_optimizer.step()
        expected.append(loss.item())
    evaluated = (built.evaluate(losses.loss_rows, **everything), loss_rows(model, **everything).detach())
    plain = dict(model.named_parameters())
    weights = (f for f in built.layout.fragments() if f.kind == WEIGHT)
    worst = max(
        (f.values - plain[f.name].detach().view(-1)[f.offset : f.offset + len(f.values)]).abs().max().item()
        for f in weights
    )
    whole = loss_rows(model, everything["inputs"], everything["labels"]).sum().item()
    return {"losses": found, "expected": expected, "worst": max(dist.all_gather_objects(worst)), "unmasked": whole,
            "rows": [rows.tolist() for rows in evaluated], "steps": built.layout.optimizer_steps}  # fmt: skip


def few_targets(stage: int, precision: str, ranks, device) -> dict:
    """Logits of the targets only, all of which lie in rows of the first rank; then a global batch without any."""
    built = build(stage, precision, 2, ranks, device)
    built.loss_rows = functools.partial(losses.loss_rows, sparse=True)
    inputs, labels = TOKENS[0, :, :-1], torch.full((BATCH, LENGTH), IGNORE)
    labels[0, 3], labels[4, 5:8] = 17, 60
    model = filled_model(built.model_config)
    expected = (loss_rows(model, inputs, labels).sum() / 4).item()
    found = []
    for its_labels in (labels, torch.full_like(labels, IGNORE), labels):
        mine = micro_batches({"inputs": inputs, "labels": its_labels}, built.micro, ranks)
        found.append(built.step(mine, int((its_labels != IGNORE).sum()), 1e-2).read())
    return {"losses": [loss for loss, _ in found], "norms": [norm for _, norm in found], "expected": expected}


def sums(ranks, device) -> dict[str, list]:
    """In bf16 with our sums of gradients and with DeepSpeed's: losses, norms, and what this rank has at the end. In the
    second step only the first rank's second micro-batch has a gradient of more than the embeddings, in the third none.
    """
    found = {}
    for whose in ("ours", "theirs"):
        ours = engine.in_fewer_passes
        if whose == "theirs":
            engine.in_fewer_passes = lambda *_: None
        built = build(1, "bf16", 2, ranks, device)
        engine.in_fewer_passes = ours

        def of_embeddings_alone(model, inputs, labels, numbers=itertools.count()):  # noqa: B008 (one for each engine)
            step, part = divmod(next(numbers), BATCH // 2 // ranks.world_size)
            if step not in (1, 2) or (step == 1 and ranks.is_main and part == 1):
                return loss_rows(model, inputs, labels)
            return model.module.trunk.embedding(inputs).float().square().sum((1, 2))

        built.loss_rows = of_embeddings_alone
        steps = train(built, ranks, 5)
        state = [[f.name, f.kind, f.values.double().tolist()] for f in built.layout.fragments()]
        found[whose] = [steps["losses"], steps["norms"], dist.all_gather_objects(state)]
    return found


def train(built: Engine, ranks, steps: int, first: int = 0) -> dict:
    """Losses, norms and the coverage of the fragments after `steps` updates."""
    losses, norms = [], []
    for k in range(first, first + steps):
        parts = micro_batches({"inputs": TOKENS[k % 2, :, :-1], "labels": LABELS[k % 2]}, built.micro, ranks)
        loss, norm = built.step(parts, int((LABELS[k % 2] != IGNORE).sum()), 1e-2).read()
        losses.append(loss)
        norms.append(norm)
    owned = [[f.name, f.kind, f.offset, len(f.values)] for f in built.layout.fragments_to_save()]
    shapes = {f.name: list(f.shape) for f in built.layout.fragments()}
    gathered = dist.all_gather_objects([owned, shapes])
    return {
        "losses": losses, "norms": norms, "steps": built.layout.optimizer_steps,
        "owned": [entry for part, _ in gathered for entry in part],
        "shapes": {name: shape for _, part in gathered for name, shape in part.items()},
    }  # fmt: skip


def half(stage: int, folder: Path, ranks, device, part="all") -> dict:
    """fp16: a few steps, beside those that go on from a checkpoint of half of them, and from a scale at which gradients
    overflow.
    """
    built = build(stage, "fp16", 2, ranks, device, part=part)
    built.loss_scale = {"cur_scale": 2.0**10, "cur_hysteresis": 1}
    first = train(built, ranks, 3)
    path, scale = folder / f"fp16-{stage}", built.loss_scale
    saver = Checkpoints(path, ranks, 1, lambda kind, **facts: None)
    saver.save(Header(3, "adamw", built.layout.optimizer_steps, {}, {}, scale), built.layout.fragments_to_save())
    assert saver.wait()
    rest = train(built, ranks, 3, first=3)
    resumed = build(stage, "fp16", 2, ranks, device, part=part)
    header = load.fill(load.choose(path, ranks, lambda kind, **facts: None), resumed.layout.fragments())
    resumed.layout.refresh(header.optimizer_steps)
    resumed.loss_scale = header.loss_scale
    again = train(resumed, ranks, 3, first=3)
    resumed.loss_scale = {"cur_scale": 2.0**60, "cur_hysteresis": 1}
    before = [fragment.values.clone() for fragment in resumed.layout.fragments()]
    parts = micro_batches({"inputs": TOKENS[0, :, :-1], "labels": LABELS[0]}, resumed.micro, ranks)
    skipped = resumed.step(parts, int((LABELS[0] != IGNORE).sum()), 1e-2)
    same = all(map(torch.equal, before, (fragment.values for fragment in resumed.layout.fragments())))
    halved = resumed.loss_scale["cur_scale"]
    next(f for f in resumed.layout.fragments() if f.kind == WEIGHT).values.fill_(float("nan"))
    resumed.layout.refresh(6)
    resumed.loss_scale = {"cur_scale": 2.0, "cur_hysteresis": 1}
    least = resumed.step(parts, int((LABELS[0] != IGNORE).sum()), 1e-2)
    return {
        "least": [least.skipped, math.isfinite(least.read()[1]), resumed.loss_scale["cur_scale"]],
        "losses": first["losses"] + rest["losses"], "norms": first["norms"] + rest["norms"], "rest": rest["losses"],
        "again": again["losses"], "scale": scale, "loaded": header.loss_scale, "skipped": skipped.skipped,
        "same": all(dist.all_gather_objects(same)), "loss": skipped.read()[0], "after": halved,
        "steps": resumed.layout.optimizer_steps,
    }  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes the types of what collectives add up over the ranks, but for single numbers, and counts the products that
    make logits.
    """

    def __init__(self):
        super().__init__()
        self.reduced: set[str] = set()
        self.logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in func.__name__:
            self.reduced |= {str(leaf.dtype) for leaf in tree_leaves(args)
                             if isinstance(leaf, torch.Tensor) and leaf.numel() > 1}  # fmt: skip
        self.logits += func is torch.ops.aten.mm.out and kwargs["out"].shape[1] == VOCAB
        return func(*args, **(kwargs or {}))


def watched(stage: int, precision: str, ranks, device) -> dict:
    """Of a few steps: the types that are added up over the ranks, how often the device is waited for, and how often
    logits are computed.
    """
    built, waits, accelerator = build(stage, precision, 2, ranks, device), [], get_accelerator()
    before, accelerator.synchronize = accelerator.synchronize, lambda *device: waits.append(device)
    try:
        with Watch() as watch:
            train(built, ranks, 4)
    finally:
        accelerator.synchronize = before
    return {"reduced": sorted(watch.reduced), "waits": len(waits), "logits": watch.logits}


def made(stage: int, precision: str, ranks, device) -> dict:
    """Of the start of an engine: whether torch drew anything, and the most bytes that the model took as it was made."""
    sizes, drawn_before = {}, torch.get_rng_state()
    gc.collect()  # what others left behind is not freed while it is watched

    def watched_model(config: ModelConfig) -> torch.nn.Module:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = build_model(config)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        in_order = sorted(events, key=lambda event: event.start_ns())
        sizes["most"] = max(itertools.accumulate(event.nbytes() for event in in_order))
        sizes["types"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
        return model

    built = build(stage, precision, 2, ranks, device, models_of=watched_model)
    shapes = [math.prod(getattr(p, "ds_shape", p.shape)) for p in built.parameters.values()]
    same = torch.equal(drawn_before, torch.get_rng_state())
    fading = (torch.full((1 << 20,), 1e-39) * 1.0).count_nonzero().item()  # by every thread
    return sizes | {"elements": sum(shapes), "largest": max(shapes), "drew": not same, "fading": fading}


def gradient(micro: int, ranks, device) -> dict:
    """The gradient of the first step, out of AdamW's first moment: exp_avg = (1 - beta1) g, without clipping."""
    built = build(1, "fp32", micro, ranks, device, clip=0.0)
    result = train(built, ranks, 1)
    mine = [(f.name, f.offset, f.values.tolist()) for f in built.layout.fragments() if f.kind == "exp_avg"]
    pieces = sorted(piece for part in dist.all_gather_objects(mine) for piece in part)
    return {"loss": result["losses"][0], "norm": result["norms"][0],
            "gradient": [value / 0.1 for _, _, values in pieces for value in values]}  # fmt: skip


def train_part(part: str, stage: int, precision: str, out: Path, ranks, device) -> dict:
    """As `move`, to the next stage, where only a part of the model learns; and which weights are as they were."""
    found, built = move(stage, (stage + 1) % 4, out.parent, ranks, device, precision, part)
    first = initial_values(config_of(stage, part).model)
    computed = torch.bfloat16 if precision == "bf16" else torch.float32  # what does not learn is kept in this
    same: dict[str, bool] = {}
    for f in built.layout.fragments():
        if f.kind == WEIGHT:
            before = first(f.name, f.shape).view(-1)[f.offset : f.offset + len(f.values)]
            same[f.name] = torch.equal(f.values.float(), before.to(computed).float())
    changed = {name for found in dist.all_gather_objects(same) for name, is_same in found.items() if not is_same}
    return found | {"changed": sorted(changed)}


def move(before: int, after: int, folder: Path, ranks, device, precision="fp32", part="all") -> tuple[dict, Engine]:
    """Three steps at one stage, a checkpoint, three at another: what it loaded and how it went on."""
    first = build(before, precision, 2, ranks, device, part=part)
    losses = train(first, ranks, 3)["losses"]
    path = folder / f"checkpoints-{part}-{precision}-{before}-{after}"
    events = []
    saver = Checkpoints(path, ranks, 1, lambda kind, **facts: events.append(kind))
    header = Header(3, "adamw", first.layout.optimizer_steps, {}, {})
    saver.save(header, first.layout.fragments_to_save())
    assert saver.wait(), events
    second = build(after, precision, 2, ranks, device, part=part)
    found = load.choose(path, ranks, lambda kind, **facts: events.append(kind))
    loaded = load.fill(found, second.layout.fragments())
    second.layout.refresh(loaded.optimizer_steps)
    result = train(second, ranks, 3, first=3)
    return result | {"losses": losses + result["losses"], "events": events}, second


if __name__ == "__main__":
    main(Path(sys.argv[1]))
