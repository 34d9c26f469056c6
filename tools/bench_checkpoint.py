"""python tools/bench_checkpoint.py [--model 14M] [--model 200M] [--threads 1] [--threads 2]

What a save costs the training that goes on beside it (`tools/bench.py checkpoint` is the same), of ours and of a thread
that calls safetensors.save, in turn: how long training waits; how long another thread cannot run, as a save holds the
GIL (its waiting for a core is not counted), and how much of that time this process computed (the rest is the machine's
when others use it); how much longer a step is meanwhile, and which part of it the training thread neither ran nor
waited for a core (it waits for the GIL, and with more than one thread for the others); the delay of training over the
CPU seconds of the thread that writes; the host's memory over the bytes that are saved.

With `--threads 1` a machine of two cores has one to spare for the thread that writes, with `--threads 2` none. Whether
it has one indeed is told by "another process": how much longer a step is beside one that hashes and writes as much,
and shares nothing with this one but the machine.
"""

import argparse
import contextlib
import hashlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors.torch
import torch

from pretrain import dist, hardware
from pretrain.checkpoint.manifest import Header
from pretrain.checkpoint.save import Checkpoints
from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import Fragment
from pretrain.engine.settings import deepspeed_config
from pretrain.files import sha256_of_file, write_synced
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows

ROUNDS = {"14M": 9, "200M": 3, "tiny": 3}  # a short step varies by more
MODELS = {
    "14M": ["model=llama_14m", "model.vocab_size=24576"], "200M": ["model=gpt2_350m", "model.layers=12"],
    "tiny": ["model=llama_tiny", "model.vocab_size=512"],
}  # fmt: skip
MEMORY, GAP, COMPUTING = "memory / fragments", "longest gap, ms", "most computing in a gap, ms"
WAIT, STEP, BLOCKED = "training waits, s", "step / without", "of it blocked"
CPU, DELAY = "writer's CPU, s", "delay / CPU"
ANOTHER_PROCESS = """
import hashlib, os, sys
block = os.urandom(1 << 24)
while True:
    with open(sys.argv[1], "wb") as file:
        for _ in range(int(sys.argv[2]) // len(block) + 1):
            hashlib.sha256(block)
            file.write(block)
        os.fsync(file.fileno())
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="which sizes (default: 14M and 200M)")
    parser.add_argument("--threads", action="append", type=int, help="threads of torch (default: 1, then 2)")
    args = parser.parse_args(argv)
    dist.start(dist.ALONE)
    for size in args.model or ("14M", "200M"):
        engine, step = engine_of(MODELS[size])
        for threads in args.threads or (1, 2):
            torch.set_num_threads(threads)
            report(size, threads, engine, step)


def engine_of(model: list[str]) -> tuple[Engine, Callable[[], object]]:
    """An engine on one rank, and a step of it of 512 tokens."""
    cfg = compose.compose("pretrain", ["run.name=bench", *model])
    device = torch.device("cpu")
    precision = hardware.resolve_precision("auto", device)
    settings = deepspeed_config(cfg.deepspeed, 2, 2, 1, 1.0, precision)
    engine = Engine(lambda: build_model(cfg.model), loss_rows, settings, cfg.optim, dist.ALONE, device)
    tokens = torch.randint(0, cfg.model.vocab_size, (2, 256))
    return engine, lambda: engine.step([{"inputs": tokens, "labels": tokens}], tokens.numel(), 1e-4)


def report(size: str, threads: int, engine: Engine, step: Callable[[], object]) -> None:
    """Measure both ways of saving in turn, and print the medians and the longest gap of all."""
    written = sum(fragment.values.nbytes for fragment in engine.layout.fragments_to_save())
    step()
    with tempfile.TemporaryDirectory() as folder:
        ways = {"ours": Ours(Path(folder)), "safetensors.save": PlainThread(Path(folder))}
        alone = {name: [measured_alone(way, engine) for _ in range(3)] for name, way in ways.items()}
        beside, another = [], []
        for _ in range(ROUNDS[size]):
            beside.append({name: measured_beside(way, engine, step) for name, way in ways.items()})
            another.append(beside_another_process(step, Path(folder) / "another", written))
    print(f"checkpoint: {size} ({written / 1e6:.0f} MB), {threads} threads; a step without a save "
          f"{1e3 * statistics.median(seconds_of(step) for _ in range(5)):.0f} ms, "
          f"longest gap without {1e3 * longest_gap(lambda: time.sleep(1))[0]:.1f} ms")  # fmt: skip
    for name in ways:
        gaps, computing, memory = zip(*alone[name], strict=True)
        figures = {MEMORY: memory[0] / written, GAP: 1e3 * max(gaps), COMPUTING: 1e3 * max(computing)}
        figures |= {key: statistics.median(found[name][key] for found in beside) for key in beside[0][name]}
        print(f"checkpoint: {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    print(f"checkpoint: another process: {STEP} {statistics.median(another):.3f}", flush=True)


class Ours:
    """Saving as it is."""

    def __init__(self, folder: Path):
        self.checkpoints = Checkpoints(folder / "ours", dist.ALONE, 1, self.told)
        self.saves = 0

    def told(self, kind: str, **facts: object) -> None:
        assert kind == "saved", facts

    def save(self, fragments: Iterable[Fragment]) -> threading.Thread:
        self.saves += 1
        self.checkpoints.save(Header(self.saves, "adamw", 1, {}, {}), fragments)
        return self.checkpoints.thread

    def wait(self) -> None:
        self.checkpoints.wait()


class PlainThread:
    """What it is compared with: copies of the fragments, and a thread that makes a whole file of them in memory."""

    def __init__(self, folder: Path):
        self.path = folder / "plain.safetensors"

    def save(self, fragments: Iterable[Fragment]) -> threading.Thread:
        copies = {f"{f.name}:{f.kind}:{f.offset}": f.values.detach().to("cpu", copy=True) for f in fragments}
        self.thread = threading.Thread(target=self.write, args=(copies,))
        self.thread.start()
        return self.thread

    def write(self, copies: dict[str, torch.Tensor]) -> None:
        payload = safetensors.torch.save(copies)
        copies.clear()
        write_synced(self.path, payload)
        assert hashlib.sha256(payload).hexdigest() == sha256_of_file(self.path)

    def wait(self) -> None:
        self.thread.join()


def measured_alone(way: Ours | PlainThread, engine: Engine) -> tuple[float, float, int]:
    """A save without training: the longest gap of another thread and the most computing in one, s, and the host's
    memory that it took.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most memory is counted from here on
    before = status("VmRSS")

    def save() -> None:
        way.save(engine.layout.fragments_to_save())
        way.wait()

    return *longest_gap(save), status("VmHWM") - before


def measured_beside(way: Ours | PlainThread, engine: Engine, step: Callable[[], object]) -> dict[str, float]:
    """A save while training goes on."""
    usual = statistics.median(seconds_of(step) for _ in range(5))
    waited = time.perf_counter()
    thread = way.save(engine.layout.fragments_to_save())
    waited = time.perf_counter() - waited
    found, whole, busy = [], 0, sum(scheduled(threading.get_native_id()))
    with reading_cpu(thread) as used:
        while not found or thread.is_alive():
            found.append(seconds_of(step))
            whole += thread.is_alive()  # the last step may see no more than the end of a save
    way.wait()
    during, all_of_it = statistics.fmean(found[: max(whole, 1)]), sum(found)
    blocked = all_of_it - (sum(scheduled(threading.get_native_id())) - busy)
    return {WAIT: waited, STEP: during / usual, BLOCKED: blocked / all_of_it, CPU: used[-1],
            DELAY: (all_of_it - len(found) * usual) / used[-1]}  # fmt: skip


def beside_another_process(step: Callable[[], object], path: Path, size: int) -> float:
    """How much longer a step is while a process of its own hashes and writes `size` bytes over and over."""
    usual = statistics.median(seconds_of(step) for _ in range(5))
    with subprocess.Popen([sys.executable, "-c", ANOTHER_PROCESS, str(path), str(size)]) as process:
        try:
            time.sleep(1)  # it has started
            return statistics.fmean(seconds_of(step) for _ in range(5)) / usual
        finally:
            process.kill()


@contextlib.contextmanager
def reading_cpu(thread: threading.Thread) -> Iterator[list[float]]:
    """The CPU seconds of a running thread so far, the latest last."""
    used, ended = [1e-9], threading.Event()

    def read() -> None:
        while not ended.wait(0.005):
            with contextlib.suppress(OSError, ValueError):  # it has ended
                used.append(scheduled(thread.native_id)[0])

    reader = threading.Thread(target=read)
    reader.start()
    yield used
    ended.set()
    reader.join()


def longest_gap(action: Callable[[], object]) -> tuple[float, float]:
    """The longest time, s, that a thread which sleeps a millisecond at a time did not run during `action`, without
    what it waited for a core; and the most CPU seconds that this process used in such a time, at most all of it.
    """
    gaps, ended = [(0.0, 0.0)], threading.Event()

    def probe() -> None:
        own, last, waited, used = threading.get_native_id(), time.perf_counter(), 0.0, time.process_time()
        while not ended.is_set():
            time.sleep(0.001)
            now, delay, cpu = time.perf_counter(), scheduled(own)[1], time.process_time()
            gap = now - last - (delay - waited)
            gaps.append((gap, min(gap, cpu - used)))
            last, waited, used = now, delay, cpu

    thread = threading.Thread(target=probe)
    thread.start()
    time.sleep(0.1)
    gaps[:] = [(0.0, 0.0)]
    action()
    ended.set()
    thread.join()
    return max(gap for gap, _ in gaps), max(computing for _, computing in gaps)


def scheduled(thread: int) -> tuple[float, float]:
    """Seconds that a thread of this process has run, and has waited for a core."""
    ran, waited, _ = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="utf-8").split()
    return int(ran) / 1e9, int(waited) / 1e9


def status(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_tool(main)
