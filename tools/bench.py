"""python tools/bench.py [loss] [attention] [step]

Measures one thing against another in one run, alternately, and prints the ratio of their medians. The machine's speed
varies; ratios taken together do not.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pretrain import compose, dist, engine, hardware
from pretrain.cli import run_tool
from pretrain.model.attention import plain, sdpa
from pretrain.model.heads import LanguageModel
from pretrain.model.losses import cross_entropy_rows

ROUNDS = 7


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], *BENCHES], help="which to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1, a rank's on 2 cores)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    precision = hardware.resolve_precision("auto", torch.device("cpu"))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for name in args.what or BENCHES:
        BENCHES[name](dtype, precision)


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], names: tuple[str, str]) -> None:
    """Run both in turn, once to warm up and then `ROUNDS` times."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_number in range(ROUNDS + 1):
        for run, kept in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            run()
            if round_number:
                kept.append(time.perf_counter() - start)
    mine, other = (statistics.median(values) for values in seconds)
    print(f"{title}: {names[0]} {1e3 * mine:.1f} ms, {names[1]} {1e3 * other:.1f} ms, ratio {mine / other:.2f}")


def bench_loss(dtype: torch.dtype, precision: str) -> None:
    """Cross entropy and its gradient at the quickstart's micro-batch, against torch's."""
    values = torch.randn(4, 256, 24576).to(dtype).requires_grad_()
    labels = torch.randint(0, 24576, (4, 256))

    def torchs(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").sum()

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy_rows(logits, labels).sum()

    def run(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        values.grad = None  # or the second run would add to the first one's
        loss(values * 1).backward()  # logits of a layer, not a parameter: ours writes its gradient over them

    runs = [functools.partial(run, loss) for loss in (ours, torchs)]
    compare(f"cross entropy ({precision})", *runs, ("ours", "torch"))


def bench_attention(dtype: torch.dtype, precision: str) -> None:
    """The formula as written against the fused kernel, forward and backward, short and long."""
    for length in (256, 1024):
        q, k, v = (torch.randn(4, 4, length, 80).to(dtype).requires_grad_() for _ in range(3))
        runs = [functools.partial(attend, route, q, k, v) for route in (plain, sdpa)]
        compare(f"attention over {length} tokens ({precision})", *runs, ("plain", "sdpa"))


def attend(route: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    route(q, k, v, True, 0.0).sum().backward()


def bench_step(dtype: torch.dtype, precision: str) -> None:
    """A step of the quickstart's model through the engine on one rank, against the bare forward and backward."""
    cfg = compose.compose("pretrain", ["run.name=bench", "experiment=quickstart", "model.vocab_size=24576"])
    ranks, device = dist.ALONE, dist.start(dist.ALONE)
    micro, accumulation = cfg.train.micro_batch_size, 2
    settings = engine.deepspeed_config(cfg.deepspeed, micro * accumulation, micro, accumulation, 1.0, precision)

    def loss_rows(model, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy_rows(model(inputs), labels)

    trainer = engine.Engine(lambda: LanguageModel(cfg.model), loss_rows, settings, cfg.optim, ranks, device)
    tokens = torch.randint(0, 24576, (micro, cfg.train.seq_len))
    parts = [(tokens, tokens)] * accumulation
    bare = LanguageModel(cfg.model).to(dtype)

    def forward_and_backward() -> None:
        for inputs, labels in parts:
            loss_rows(bare, inputs, labels).sum().backward()

    targets = tokens.numel() * accumulation
    compare(f"step of {targets} tokens ({precision})", lambda: trainer.step(parts, targets, 1e-4),
            forward_and_backward, ("engine", "bare model"))  # fmt: skip


BENCHES = {"loss": bench_loss, "attention": bench_attention, "step": bench_step}

if __name__ == "__main__":
    run_tool(main)
