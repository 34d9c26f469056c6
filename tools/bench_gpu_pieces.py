"""python tools/bench_gpu_pieces.py PIECE --device cuda --rows FILE

One piece of `tools/bench_gpu.py`, which starts it: what it has checked or measured, each a line of JSON in FILE as soon
as it is known.
"""

import argparse
import functools
import gc
import json
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain import dist, hardware
from pretrain.cli import FAILED, FINISHED, run_tool
from pretrain.config import compose
from pretrain.config.schema import Config
from pretrain.engine import memory
from pretrain.engine.settings import deepspeed_config
from pretrain.model.attention import Spans, bounds_of, near, plain, same_document, sdpa, why_masks
from pretrain.model.heads import build_model
from pretrain.model.initial import fill_initial
from pretrain.model.losses import loss_rows
from pretrain.model.transformer import flops_per_token
from pretrain.optim import optimizers

TINY = ["model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=2", "model.ffn_width=128",
        "model.vocab_size=256", "train.seq_len=32"]  # fmt: skip
SMALL = ["model=llama_14m", "model.vocab_size=256", "model.init=scaled", "train.seq_len=256"]
SPEEDS = {  # what a model is, and rows of a micro-batch
    "124M": (["model=gpt2_124m", "train.seq_len=1024"], 16), "1B": (["model=llama_1b", "train.seq_len=2048"], 4),
    "8B": (["model=llama_8b", "model.layers=4", "train.seq_len=4096"], 2),
}  # fmt: skip
HEADS = {"124M": (12, 12, 64), "8B": (32, 8, 128)}  # queries, keys and values, and how wide
USABLE, LR = 0.9, 1e-2  # of a card's memory
FUSED = r"(?:aten::_scaled_dot_product|torch_attn::)_((?!.*backward)\w+)"  # torch's names of the kernels of attention
Parts = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """A line of the table: `passed` is None where something is only measured. `facts`: its figures, for the JSON."""

    what: str
    passed: bool | None
    found: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a piece runs, the precision below fp32 there, and whether shapes are tiny."""

    device: torch.device
    low: str
    is_tiny: bool

    def configured(self, overrides: list[str], stage: int = 1) -> Config:
        size = TINY if self.is_tiny else []
        return compose.compose("pretrain", ["run.name=bench", f"deepspeed=zero{stage}", *overrides, *size])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--rows", type=Path, required=True)
    args, code = parser.parse_args(argv), FINISHED
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever a container has set
    with open(args.rows, "w", encoding="utf-8", buffering=1) as file:
        try:
            for row in PIECES[args.piece](place_of(args.device)):
                file.write(json.dumps(asdict(row)) + "\n")
        except Exception as error:  # whatever it is, it is what the piece has found
            traceback.print_exc()
            code, found = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
            file.write(json.dumps(asdict(Row("the piece itself", False, found))) + "\n")
    dist.finish(code, is_agreed=False)


def place_of(kind: str) -> Place:
    device = dist.device_of()
    if device.type != kind:
        raise ValueError(f"torch {torch.__version__} sees no GPU: --device cpu tries the command out without one")
    has_bf16 = kind == "cpu" or hardware.resolve_precision("auto", device) == "bf16"
    return Place(device, "bf16" if has_bf16 else "fp16", kind == "cpu")


def device_choice(place: Place) -> Iterator[Row]:
    device, seen = place.device, torch.cuda.device_count()
    name = torch.cuda.get_device_name(device) if seen else "the CPU"
    yield Row("chosen", True, f"{device}, {name}, torch {torch.__version__}", {"environment": hardware.environment()})
    try:
        last = str(dist.device_of(dist.Ranks(7, 8, 7)))
    except ValueError:
        last = "refused"
    expected = "cpu" if not seen else "cuda:0" if seen == 1 else "cuda:7" if seen > 7 else "refused"
    yield Row("LOCAL_RANK=7", last == expected, f"{last}, of {seen} GPUs that are seen")
    places = [["host", dist.gpu_id(device) if seen else "none"]] * 2
    yield Row("two ranks on one GPU", dist.shared_gpus(places) is not None, f"refused, by its id {places[0][1]}")
    peak, source = hardware.peak_flops(device, place.low)
    size, times = (256, 2) if place.is_tiny else (8192, 30)
    a = torch.randn(size, size, device=device).to(hardware.DTYPES[place.low])
    measured = 2 * size**3 * times / seconds_of(place, lambda: a @ a, times)
    yield Row(f"peak in {place.low}", measured < 1.05 * peak or place.is_tiny,
              f"{peak / 1e12:.4g} TFLOP/s ({source}); a product reaches {measured / 1e12:.4g}",
              {"peak_flops": peak, "product_flops": measured})  # fmt: skip


def seconds_of(place: Place, run: Callable[[], object], times: int) -> float:
    """Of so many runs, after one to warm up."""
    wait = torch.cuda.synchronize if place.device.type == "cuda" else lambda: None
    run()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return time.perf_counter() - start


def collectives(place: Place) -> Iterator[Row]:
    device = dist.start(dist.ALONE)
    backends = torch.distributed.get_backend_config()
    expected = ("cpu:gloo", "cuda:nccl") if device.type == "cuda" else ("cpu:gloo",)
    yield Row("process group", all(each in backends for each in expected), backends)
    for where in {device, torch.device("cpu")}:
        total = dist.all_reduce_sum(torch.arange(1000.0, device=where)).sum().item()
        yield Row(f"sum over the ranks on {where}", total == 499500, f"{total:.0f}")
    late = dist.LateSum(torch.ones(4, dtype=torch.float64, device=device)).read()
    yield Row("a step's small sum, read late", late == [1.0] * 4, f"{late}")
    dist.expect_steps()
    gathered = dist.all_gather_objects("rank 0", dist.new_cpu_group())
    yield Row("the background's group, and a time limit", gathered == ["rank 0"], f"{dist.step_timeout()}")


def attention(place: Place) -> Iterator[Row]:
    """Output and gradients in each precision against fp64, beside the formula's own error in that precision."""
    for precision, shape in (("fp32", "124M"), (place.low, "124M"), (place.low, "8B")):
        (heads, groups, width), length = ((4, 2, 16), 64) if place.is_tiny else (HEADS[shape], 1024)
        torch.manual_seed(0)
        sizes = [(2, count, length, width) for count in (heads, groups, groups, heads)]
        qkvg = [torch.randn(size, device=place.device).to(hardware.DTYPES[precision]) for size in sizes]
        given = masks(length, place.device, qkvg[0])
        for name, mask in masks(length, place.device).items():
            with profile(activities=[ProfilerActivity.CPU]) as seen:  # the host's side names the kernels too
                found = route_of(sdpa, qkvg, given[name])
            kernels = {key[1] for event in seen.events() if (key := re.match(FUSED, event.name))}
            exact, formula = route_of(plain, [x.double() for x in qkvg], mask), route_of(plain, qkvg, mask)
            error, other = largest(found, exact), largest(formula, exact)
            same_mask = mask is None or torch.equal(mask.cpu(), masks(length, torch.device("cpu"))[name])
            passed = same_mask and error <= 8 * other + torch.finfo(found[0].dtype).eps
            said = f"{' '.join(kernels)}: error {error:.1e}, of the formula {other:.1e}"
            facts = {"kernels": [*kernels], "error": error, "formula": other}
            yield Row(f"{name}, {precision}, heads of {shape}", passed, said, facts)


def masks(length: int, device: torch.device, q: torch.Tensor | None = None) -> dict[str, torch.Tensor | Spans | None]:
    """Made on the device where they are used. With queries what a model has there, spans if a kernel takes them."""
    document, place = length // 3, torch.arange(2 * length, device=device) % length
    if q is not None and why_masks(device, q.dtype, q.shape[-1], 0.0) is None:
        documents, rows = (bounds_of(place % size == 0) for size in (document, length))
        return {"causal": None, "documents": Spans(*documents, (-1, 0)), "window": Spans(*rows, (length // 4 - 1, 0))}
    window = near(length, length, length // 4, True, device)[None, None]
    return {"causal": None, "documents": same_document((place // document).view(2, length), True), "window": window}


def route_of(route: Callable, qkvg: list[torch.Tensor], mask: torch.Tensor | Spans | None) -> list[torch.Tensor]:
    """What comes out, and the gradients of queries, keys and values."""
    *qkv, gradient = (x.detach().requires_grad_() for x in qkvg)
    mixed = route(*qkv, True, 0.0, mask)
    return [mixed.detach(), *torch.autograd.grad(mixed, qkv, gradient.detach())]


def largest(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest difference, over the largest number."""
    pairs = zip(found, exact, strict=True)
    return max(((mine.double() - other).abs().max() / other.abs().max()).item() for mine, other in pairs)


def engine_of(place: Place, cfg: Config, precision: str, rows: int, parts: int) -> Any:
    """An engine on this device alone, with initial values, for steps of `parts` micro-batches of `rows` rows."""
    from pretrain.engine.engine import Engine  # here, so that pieces without DeepSpeed go on where that is broken

    settings = deepspeed_config(cfg.deepspeed, rows * parts, rows, parts, cfg.optim.grad_clip, precision)
    engine = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, dist.ALONE, place.device)
    for each in weights_of(engine):
        fill_initial(each.values, each.offset, each.name, each.shape, cfg.model, 0)
    engine.layout.refresh(0)
    return engine


def weights_of(engine: Any) -> list[Any]:
    """The fragments of the weights: on one rank each is a whole parameter."""
    return [each for each in engine.layout.fragments() if each.kind == "weight"]


def batch_of(cfg: Config, rows: int, parts: int, device: torch.device, seed: int = 0) -> tuple[Parts, int]:
    """Micro-batches of random tokens, and how many targets they have."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(cfg.model.vocab_size, (parts, rows, cfg.train.seq_len + 1), generator=generator).to(device)
    return [{"inputs": part[:, :-1], "labels": part[:, 1:]} for part in tokens], tokens[:, :, 1:].numel()


def stage(number: int, place: Place) -> Iterator[Row]:
    dist.start(dist.ALONE)
    yield equal_step(number, place)
    rows, cfg = 2 if place.is_tiny else 8, place.configured(SPEEDS["124M"][0], number)
    low = "fp32" if number == 0 and place.low == "fp16" else place.low  # stage 0 does not train in fp16
    yield peak_memory(replace(place, low=low), cfg, rows, 2 if number else 1)[0]


def equal_step(number: int, place: Place) -> Row:
    """One update in fp32 beside torch's own on the CPU. A large eps, or AdamW would make whole steps of rounding."""
    cfg = place.configured([*SMALL, "optim.eps=1e-4"], number)
    engine = engine_of(place, cfg, "fp32", 2, 2)
    loss, norm = engine.step(*batch_of(cfg, 2, 2, place.device), LR).read()
    expected, expected_loss, expected_norm = by_torch_alone(cfg, *batch_of(cfg, 2, 2, torch.device("cpu")))
    apart = [(each.values.cpu() - expected[each.name].detach().flatten()).abs().max() for each in weights_of(engine)]
    off = [abs(loss / expected_loss - 1), abs(norm / expected_norm - 1), max(apart).item() / LR]
    said = f"loss off by {off[0]:.1e}, gradient norm by {off[1]:.1e}, a weight by {off[2]:.1e} of the learning rate"
    passed = off[0] < 1e-5 and off[1] < 1e-3 and off[2] < 1e-2
    return Row("a step in fp32 as on the CPU", passed, said, {"loss": loss, "norm": norm, "off": off})


def by_torch_alone(cfg: Config, parts: Parts, targets: int) -> tuple[dict[str, torch.Tensor], float, float]:
    """On the CPU, without DeepSpeed: the parameters after a step, its loss and its gradient norm."""
    model = build_model(cfg.model)
    for name, parameter in model.named_parameters():
        fill_initial(parameter.data.view(-1), 0, name, tuple(parameter.shape), cfg.model, 0)
    optimizer = optimizers.build(replace(cfg.optim, lr=LR), model.named_parameters())
    loss = sum(loss_rows(model, **part).sum() for part in parts) / targets
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
    optimizer.step()
    return dict(model.named_parameters()), loss.item(), norm.item()


def peak_memory(place: Place, cfg: Config, rows: int, accumulation: int) -> tuple[Row, Callable[[], Any]]:
    """The most that tensors take within a step, beside what is computed before anything is allocated; and the step."""
    gc.collect()  # DeepSpeed's engines are circles
    before = torch.cuda.memory_allocated()
    engine = engine_of(place, cfg, place.low, rows, accumulation)
    step = functools.partial(engine.step, *batch_of(cfg, rows, accumulation, place.device), 1e-4)
    step().read()  # the second one finds everything in place
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step().read()
    found, expected = torch.cuda.max_memory_allocated() - before, footprint(cfg, place.low, rows).peak
    off, passed = f"{found / 1e9:.3f} ({found / expected - 1:+.1%})", abs(found / expected - 1) < 0.1
    if place.device.type == "cpu":
        off, passed = "torch counts a GPU's only", None
    said, facts = f"{expected / 1e9:.3f} GB by show_model, {off}", {"found": found, "expected": expected}
    return Row(f"memory, {rows} rows in {place.low}", passed, said, facts), step


def footprint(cfg: Config, precision: str, rows: int) -> memory.Footprint:
    activations = memory.activations(cfg.model, rows, cfg.train.seq_len, precision, cfg.train.activation_checkpointing)
    return memory.footprint(memory.counts(cfg.model, cfg.optim.name), cfg.deepspeed.stage, 1, precision, activations)


def curve(place: Place) -> Iterator[Row]:
    """A small model learns the bytes of a file that every Python has."""
    dist.start(dist.ALONE)
    cfg = place.configured(SMALL)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - cfg.train.seq_len, (24, 16), generator=torch.Generator().manual_seed(0))
    rows = text[starts[..., None] + torch.arange(cfg.train.seq_len + 1)].to(place.device)
    losses = {}
    for precision in ("fp32", place.low):
        engine = engine_of(place, cfg, precision, 16, 1)
        steps = [engine.step([{"inputs": row[:, :-1], "labels": row[:, 1:]}], row[:, 1:].numel(), 3e-3) for row in rows]
        losses[precision] = [step.read()[0] for step in steps]
    exact, low = losses.values()
    apart = max(abs(a - b) for a, b in zip(exact, low, strict=True))
    said = f"{exact[0]:.3f} -> {exact[-1]:.3f} and {low[0]:.3f} -> {low[-1]:.3f}, at most {apart:.4f} apart"
    yield Row(f"24 steps in fp32 and {place.low}", exact[-1] < exact[0] - 0.5 and apart < 0.05, said, losses)


def resume(place: Place) -> Iterator[Row]:
    hardware.set_deterministic(True)  # as train.deterministic does
    dist.start(dist.ALONE)
    for number in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            yield resumed(place, place.configured([*SMALL, "model.dropout=0.1"], number), Path(folder))


def resumed(place: Place, cfg: Config, folder: Path) -> Row:
    """Four steps, saved after two; an engine that loads that does the others again, with the same bits."""
    from pretrain.checkpoint import load
    from pretrain.checkpoint.manifest import Header
    from pretrain.checkpoint.save import Checkpoints

    def losses(engine: Any, steps: range) -> list[float]:
        return [engine.step(*batch_of(cfg, 2, 2, place.device, step), 1e-3, step).read()[0] for step in steps]

    first, second = (engine_of(place, cfg, place.low, 2, 2) for _ in range(2))
    losses(first, range(2))
    checkpoints = Checkpoints(folder, dist.ALONE, 1, lambda kind, **facts: print(kind, facts))
    header = Header(2, cfg.optim.name, first.layout.optimizer_steps, {}, asdict(cfg.model))
    checkpoints.save(header, first.layout.fragments_to_save())
    second.loss_scale = first.loss_scale
    saved, before = checkpoints.wait(), losses(first, range(2, 4))
    chosen = load.choose(folder, dist.ALONE, lambda kind, **facts: print(kind, facts))
    second.layout.refresh(load.fill(chosen, second.layout.fragments()).optimizer_steps)
    again = losses(second, range(2, 4))
    both = zip(first.layout.fragments(), second.layout.fragments(), strict=True)
    differing = [mine.name for mine, other in both if not torch.equal(mine.values, other.values)]
    said = f"losses {'equal' if before == again else 'differ'}, {len(differing)} weights and moments differ"
    facts = {"losses": before, "again": again, "differing": differing}
    return Row(f"zero{cfg.deepspeed.stage} in {place.low}", saved and before == again and not differing, said, facts)


def speed(name: str, place: Place) -> Iterator[Row]:
    dist.start(dist.ALONE)
    overrides, rows = SPEEDS[name]
    cfg = place.configured(overrides)
    if not place.is_tiny:
        room = int(USABLE * hardware.memory_of(place.device))
        memory.check_fits(memory.counts(cfg.model, cfg.optim.name), 1, 1, place.low, room)
        while rows > 1 and footprint(cfg, place.low, rows).peak > room:
            rows //= 2
    row, step = peak_memory(place, cfg, rows, 2)
    yield row
    times = 2 if place.is_tiny else 10
    rate = 2 * rows * cfg.train.seq_len * times / seconds_of(place, step, times)
    peak, source = hardware.peak_flops(place.device, place.low)
    mfu = rate * flops_per_token(cfg.model, cfg.train.seq_len) / peak
    yield Row(f"{cfg.model.layers} layers of {cfg.model.width}, {cfg.train.seq_len} tokens a row", None,
              f"{rate:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:.4g} TFLOP/s",
              {"tokens_per_second": rate, "mfu": mfu, "peak_flops": peak, "peak_source": source})  # fmt: skip


PIECES = {
    "device": device_choice, "collectives": collectives, "attention": attention, "curve": curve, "resume": resume,
    **{f"zero{number}": functools.partial(stage, number) for number in range(4)},
    **{name: functools.partial(speed, name) for name in SPEEDS},
}  # fmt: skip

if __name__ == "__main__":
    run_tool(main)
