"""python tools/bench_train.py [KEY=VALUE ...] [--ranks 1 2] [--against bare floor ...] [--profile DIR] [--json FILE]

How fast a run trains on this machine's processor (`tools/bench.py train` is the same): the training program itself,
with its data stream, journal, events and guard, against others that take turns with it in one run. KEY=VALUE as the
trainer takes them.

    python tools/bench_train.py experiment=quickstart data.train=runs/quickstart-data/shards
    python tools/bench_train.py model=llama_14m model.vocab_size=24576 train.seq_len=256 --ranks 1 --profile profile
    python tools/bench_train.py model=gpt2_124m model.layers=6 model.heads=6 model.width=384 model.vocab_size=8192 \\
        train.seq_len=256 train.global_batch_size=8 train.micro_batch_size=4 --ranks 1 2 --json nanogpt.json
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pretrain import hardware
from pretrain.cli import FAILED, FINISHED, child, run_tool, stops_as_ctrl_c
from pretrain.config import compose
from pretrain.config.schema import Config, TrainConfig
from pretrain.config.steps import accumulation_steps
from pretrain.files import check_output, write_atomically
from pretrain.model.heads import parameter_shapes
from pretrain.shards.writer import DatasetWriter, token_dtype
from pretrain.stream import opening
from pretrain.tokenizer.sentencepiece import train as train_tokenizer
from pretrain.tokenizer.tokenizer import load_tokenizer

EPILOG = """
contestants, each in processes of its own, which take turns and never run at the same time:
  pretrain      the training program, once for each of --ranks, with the threads that its launchers give a rank
  bare          the same model, data, precision and micro-batches in a loop written by hand: fp32 weights, gradients
                added up in fp32, clipping, fused AdamW (or torch's Muon); one process. Its losses show that it is so
  floor         all matrix products of a step, alone, at their own shapes and in their own precision
  trainer       transformers' Trainer with the architecture that computes the same, in bf16 where the run is
  nanogpt       nanoGPT's loop in fp32, as it comes, with as many layers and heads, as wide; nanogpt-bf16: in autocast
The last three take as many rows at a time as all ranks of ours together.

threads: those of a rank are OMP_NUM_THREADS, else the cores shared out among the ranks; the others have as many as our
ranks together. `taskset -c 0` leaves one core, OMP_NUM_THREADS=1 one thread a rank.

A ratio is of tokens a second in the same round; quote the minimum. Where others use the machine, CPU seconds say more.
Steps of warm-up come first. Neither evaluation nor checkpoints are in it (tools/bench.py checkpoint has those). Without
data.train tokens are random ones; the vocabulary is then 24,576 where the model has none of its own.

--profile DIR: after the rounds, where a step's time goes, to 100 %: each moment counts for the innermost function that
is watched, and what is none of them is `other`. It is that of rank 0, with the CPU seconds of all its threads. Then
some steps under torch.profiler, whose operators are listed; DIR/*.json are their traces, for ui.perfetto.dev.
"""
PROGRAM, TABLE = (str(Path(__file__).with_name(f"bench_train_{name}.py")) for name in ("pieces", "table"))
NAMES = {
    "bare": "bare loop", "floor": "its matrix products", "trainer": "Trainer of transformers",
    "nanogpt": "nanoGPT's loop", "nanogpt-bf16": "nanoGPT's loop, autocast",
}  # fmt: skip
PEERS = ("trainer", "nanogpt", "nanogpt-bf16")
NEEDED = {"trainer": ("transformers", "accelerate")}
WARM_UP, TRACED = 3, 3
VOCABULARY = 24576
LOG_KEPT = 1500  # characters of what a contestant that ended has printed


@dataclass
class Contestant:
    """What trains in turn: a process, or one for each rank. `reports` are those of its rounds, of each rank."""

    key: str
    name: str
    ranks: int
    threads: int
    log: Path
    processes: list[subprocess.Popen] = field(default_factory=list)
    reports: list[list[dict]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    profile: list[dict] = field(default_factory=list)
    failed: str | None = None

    def turn(self, steps: int, profile: bool = False, trace: str | None = None) -> list[dict]:
        """Have it do some steps, and wait; what each rank reports. `EOFError` when one has ended."""
        for rank, process in enumerate(self.processes):
            asked = {"steps": steps, "profile": profile, "trace": trace and trace.format(rank=rank)}
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
        return self.heard()

    def heard(self) -> list[dict]:
        """The line of each rank, when it stands before a step."""
        lines = [process.stdout.readline() for process in self.processes]
        if not all(line.endswith("\n") for line in lines):
            raise EOFError(self.name)
        reports = [json.loads(line) for line in lines]
        self.losses += reports[0]["losses"]
        return reports


class Setting(NamedTuple):
    """The run that is measured, as each contestant takes it."""

    config: Config
    overrides: list[str]
    data: str
    precision: str
    folder: Path


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="what is trained (default: the trainer's)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1],
                        help="processes of ours, one number or several (default: 1)")  # fmt: skip
    parser.add_argument("--against", nargs="*", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="of a contestant in a round (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="where a step's time goes; a trace in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures as one JSON object")
    args = parser.parse_intermixed_args(argv)
    if min(*args.ranks, args.rounds, args.steps) < 1:
        parser.error("--ranks, --rounds and --steps count from 1")
    if args.json:
        check_output(args.json)
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
    with stops_as_ctrl_c(), tempfile.TemporaryDirectory() as folder:
        setting = prepare(args.overrides, args.ranks, Path(folder))
        facts = measure(setting, args)
        found = args.json or Path(folder, "found.json")
        write_atomically(found, json.dumps(facts, indent=1).encode())
        print(subprocess.run([sys.executable, TABLE, found], check=True, capture_output=True, encoding="utf-8").stdout)
    sys.exit(FAILED if facts["failed"] else FINISHED)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def threads_of(ranks: int) -> int:
    """Of each rank, as launch/env.sh has it."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(cores() // ranks, 1))


def prepare(said: list[str], ranks: list[int], folder: Path) -> Setting:
    """The run as each contestant takes it. `ValueError` for every mistake in it."""
    overrides = ["run.name=bench", *said, f"run.root={folder}", "train.steps=1000000", "train.phases=[]",
                 "train.save_every=0", "train.eval_every=0", "data.val=null"]  # fmt: skip
    config = compose.compose("pretrain", overrides)
    for count in {1, *ranks}:
        accumulation_steps(config.train, count)
    data = ", ".join(map(str, config.data.sources)) or "random tokens"
    if not config.data.sources:
        vocab_size = config.model.vocab_size or VOCABULARY
        overrides += [f"model.vocab_size={vocab_size}", f"data.train={folder / 'data'}"]
        random_data(folder / "data", vocab_size, config.train)
        config = compose.compose("pretrain", overrides)
    needed = opening.open_tokenizer(config.data, opening.open_sources(config.data)).vocab_size
    if 0 < config.model.vocab_size < needed:
        raise ValueError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {needed} ids: take 0")
    overrides.append(f"model.vocab_size={config.model.vocab_size or needed}")
    precision = hardware.resolve_precision(config.train.precision, torch.device("cpu"))
    return Setting(compose.compose("pretrain", overrides), overrides, data, precision, folder)


def random_data(folder: Path, vocab_size: int, train: TrainConfig) -> None:
    """Write shards of random tokens over a vocabulary, enough for some dozens of batches."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(map("".join, itertools.permutations("abcdef")), 280))
    tokenizer = load_tokenizer(folder)
    writer = DatasetWriter(folder, token_dtype(vocab_size), max(1 << 18, train.seq_len + 1), 1 << 22)
    count = max(1 << 20, 64 * train.global_batch_size * (train.seq_len + 1))
    for document in np.array_split(np.random.default_rng(0).integers(7, vocab_size, count), 256):
        writer.add(document, text_bytes=len(document))
    writer.finish(tokenizer.sha256, vocab_size, dict(tokenizer.special_ids))


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Start every contestant, have them take turns, end them; the figures."""
    absent, contestants, micro = {}, [], setting.config.train.micro_batch_size
    for ranks in dict.fromkeys(args.ranks):
        name = f"pretrain, {counted(ranks, 'rank')} x {counted(threads_of(ranks), 'thread')}"
        contestants.append(Contestant("ours", name, ranks, threads_of(ranks), setting.folder / f"ours-{ranks}.log"))
    together = max(its.ranks * its.threads for its in contestants)
    for key in dict.fromkeys(args.against):
        if reason := why_absent(key, setting.precision):
            absent[NAMES[key]] = reason
        else:
            contestants.append(Contestant(key, NAMES[key], 1, together, setting.folder / f"{key}.log"))
    turns = len(contestants) * (1 + args.rounds) + 2 * bool(args.profile) * sum(map(is_profiled, contestants))
    with contextlib.ExitStack() as stack, tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        for its in contestants:
            bar.set_description(f"starting {its.name}")
            with noting_end(its):
                start(its, setting, micro * max(args.ranks) if its.key in PEERS else micro, stack)
                its.turn(WARM_UP)
            bar.update()
        for number, its in itertools.product(range(args.rounds), contestants):
            if its.failed is None:
                bar.set_description(f"round {number + 1} of {args.rounds}, {its.name}")
                with noting_end(its):
                    its.reports.append(its.turn(args.steps))
            bar.update()
        for its in filter(is_profiled, contestants if args.profile else ()):
            bar.set_description(f"profile of {its.name}")
            with noting_end(its):
                trace = args.profile / f"{its.key}-{its.ranks}-rank{{rank}}.json"
                its.profile = [its.turn(args.steps, True)[0], its.turn(min(args.steps, TRACED), True, str(trace))[0]]
            bar.update(2)
    return facts_of(setting, contestants, absent, args)


def is_profiled(contestant: Contestant) -> bool:
    return contestant.key in ("ours", "bare") and contestant.failed is None


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def why_absent(key: str, precision: str) -> str | None:
    if any(importlib.util.find_spec(module) is None for module in NEEDED.get(key, ())):
        return "not installed (pip install transformers accelerate)"
    if key == "nanogpt-bf16" and precision != "bf16":
        return f"this run is in {precision}"
    return None


def start(contestant: Contestant, setting: Setting, rows: int, stack: contextlib.ExitStack) -> None:
    """Start its processes, which end with `stack`, and wait until all stand before their first step."""
    facts = {"overrides": [*setting.overrides, f"run.name={contestant.key}-{contestant.ranks}"], "rows": rows}
    command = [sys.executable, PROGRAM, contestant.key, json.dumps(facts)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(contestant.ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(contestant.threads), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": contestant.ranks, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}  # fmt: skip
        environment = {name: value for name, value in environment.items() if name not in group}
        if contestant.key == "ours":  # the Trainer would join one
            environment |= {name: str(value) for name, value in group.items()}
        log = stack.enter_context(open(contestant.log, "ab"))
        contestant.processes.append(stack.enter_context(process(command, environment, log)))
    contestant.heard()


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Any) -> Iterator[subprocess.Popen]:
    """A process that is over when this is; Ctrl-C is not for it."""
    options = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    with child(command, encoding="utf-8", start_new_session=True, **options) as started:
        yield started
        started.kill()
        started.wait()


@contextlib.contextmanager
def noting_end(contestant: Contestant) -> Iterator[None]:
    """A contestant that ends is out of the race, and the others go on."""
    try:
        yield
    except EOFError:
        log = contestant.log.read_text(encoding="utf-8", errors="replace")
        contestant.failed = log[-LOG_KEPT:].strip() or "it ended without a word"
        for its in contestant.processes:
            its.kill()


def facts_of(
    setting: Setting, contestants: list[Contestant], absent: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is shown, as plain numbers."""
    config = setting.config
    rows, tokens = [], config.train.global_batch_size * config.train.seq_len
    for its in contestants:
        if its.failed is None:
            sums = [sum(report["cpu_seconds"] for report in ranks) / args.steps for ranks in its.reports]
            speeds = [tokens * args.steps / max(report["seconds"] for report in ranks) for ranks in its.reports]
            rows.append({"name": its.name, "key": its.key, "ranks": its.ranks, "threads": its.threads,
                         "tokens_per_second": speeds, "cpu_seconds_per_step": sums,
                         "peak_bytes": max(report["peak_bytes"] for report in its.reports[-1])})  # fmt: skip
    return {
        "environment": hardware.environment(), "model": asdict(config.model),
        "parameters": sum(map(math.prod, parameter_shapes(config.model).values())),
        "train": asdict(config.train), "data": setting.data, "overrides": args.overrides, "rounds": args.rounds,
        "precision": setting.precision, "zero_stage": config.deepspeed.stage, "contestants": rows,
        "failed": {its.name: its.failed for its in contestants if its.failed is not None}, "steps": args.steps,
        "absent": absent, "ratios": ratios(rows), "losses": differences(setting, contestants),
        "profiles": [profile_of(its, args.steps) for its in contestants if its.profile],
    }  # fmt: skip


def ratios(rows: list[dict]) -> list[dict[str, Any]]:
    """Of ours to each other, and of the bare loop to its products, of the same rounds."""
    found = []
    for ours, other in itertools.product(rows, rows):
        if other["key"] != "ours" and (ours["key"] == "ours" or (ours["key"], other["key"]) == ("bare", "floor")):
            each = [a / b for a, b in zip(ours["tokens_per_second"], other["tokens_per_second"], strict=True)]
            found.append({"of": ours["name"], "to": other["name"], "median": statistics.median(each),
                          "minimum": min(each), "rounds": each})  # fmt: skip
    return found


def differences(setting: Setting, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """How far our journals' losses are from the bare loop's, step by step: they train the same."""
    found, bare = [], next((its.losses for its in contestants if its.key == "bare"), [])
    for its in contestants if bare else ():
        if its.key == "ours" and its.failed is None:
            with open(setting.folder / f"ours-{its.ranks}" / "metrics.jsonl", encoding="utf-8") as journal:
                losses = [json.loads(line)["loss"] for line in journal if line.endswith("\n")]
            apart = [abs(a - b) for a, b in zip(losses, bare, strict=False)]
            found.append({"name": its.name, "steps": len(apart), "largest": max(apart)})
    return found


def profile_of(contestant: Contestant, steps: int) -> dict[str, Any]:
    """Of rank 0: seconds of a step by section, CPU seconds by thread, seconds by operator in the steps traced."""
    whole, traced = contestant.profile
    total = sum(seconds for seconds, _ in whole["sections"].values())
    sections = {name: {"seconds": seconds / steps, "share": seconds / total, "cpu_seconds": cpu / steps}
                for name, (seconds, cpu) in whole["sections"].items()}  # fmt: skip
    each = min(steps, TRACED)
    return {
        "name": contestant.name, "step_seconds": whole["seconds"] / steps, "sections": sections,
        "threads": {name: seconds / steps for name, seconds in whole["threads"].items()},
        "operators": [{"name": name, "calls": calls / each, "seconds": seconds / each}
                      for name, calls, seconds in traced["operators"]],
    }  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
