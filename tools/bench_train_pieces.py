"""python tools/bench_train_pieces.py CONTESTANT JSON

One process of tools/bench_train.py: a contestant that trains when it is told to. It says on stdout, a line of JSON,
that it stands before a step and what the steps since the last line took, and reads on stdin how many come next; what
anything else prints goes to stderr. It ends when stdin does. JSON has `overrides`, complete, and `rows`, how many of a
step's it takes at once.
"""

import argparse
import collections
import functools
import gc
import json
import os
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain import hardware
from pretrain.config import compose

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all_single", "all_gather_object", "barrier",
)  # fmt: skip
# Where DeepSpeed's optimizers, by stage and precision, take in a gradient while the backward pass goes on.
TAKES_GRADIENT = (
    "accumulate_hp_grads_and_remove_lp", "process_gradients", "reduce_ready_partitions_and_remove_grads",
    "reduce_gradients", "overlapping_partition_gradients_reduce_epilogue",
)  # fmt: skip
OTHER = "other"
OPERATORS = 40


class Sections:
    """Where the time of this thread goes: each moment counts for the innermost function that is watched."""

    def __init__(self) -> None:
        self.is_on, self.thread = False, threading.get_ident()
        self.names: set[str] = set()

    def watch(self, owner: Any, attribute: str, section: str) -> None:
        inner = getattr(owner, attribute)
        self.names.add(section)

        @functools.wraps(inner)
        def watched(*args, **kwargs):
            if not self.is_on or threading.get_ident() != self.thread:
                return inner(*args, **kwargs)
            self._mark()
            self._within.append(section)
            try:
                with torch.profiler.record_function(section):
                    return inner(*args, **kwargs)
            finally:
                self._mark()
                self._within.pop()

        setattr(owner, attribute, watched)

    def begin(self) -> None:
        self.is_on, self._within = True, [OTHER]
        self._spent, self._last = collections.defaultdict(lambda: [0.0, 0.0]), clocks()

    def end(self) -> dict[str, list[float]]:
        """Of each section the seconds, and the CPU seconds of all threads meanwhile."""
        self._mark()
        self.is_on = False
        return self._spent

    def _mark(self) -> None:
        now, spent = clocks(), self._spent[self._within[-1]]
        spent[0], spent[1] = spent[0] + now[0] - self._last[0], spent[1] + now[1] - self._last[1]
        self._last = now


def clocks() -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads of this process."""
    return time.perf_counter(), time.process_time()


def threads() -> dict[str, float]:
    """CPU seconds of the threads of this process so far, by name."""
    found: dict[str, float] = collections.defaultdict(float)
    for folder in Path("/proc/self/task").iterdir():
        name = (folder / "comm").read_text(encoding="utf-8").strip()
        name = "main" if folder.name == str(os.getpid()) else name
        found[name] += int((folder / "schedstat").read_text(encoding="utf-8").split()[0]) / 1e9
    return found


class Gate:
    """What a contestant passes before each step: there it waits until it is told how many to do."""

    def __init__(self) -> None:
        self._told = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._left, self._kept, self._profiler = 0, {}, None
        self.sections, self.losses, self._is_watched = Sections(), [], False

    def __call__(self, watches: Callable[[], Iterator[tuple]] = lambda: iter(())) -> None:
        """`watches` gives the arguments of `Sections.watch`, for a profile."""
        if not self._left:
            self._report()
            asked = json.loads(sys.stdin.readline() or "null")
            if asked is None:
                os._exit(0)
            self._begin(asked, watches)
        self._left -= 1

    def _begin(self, asked: dict, watches: Callable[[], Iterator[tuple]]) -> None:
        self._left, self._asked = asked["steps"], asked
        if asked["profile"] and not self._is_watched:
            self._is_watched = True
            for watch in watches():
                self.sections.watch(*watch)
        gc.collect()
        self._threads = threads()
        if asked["trace"]:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._profiler.start()
        if asked["profile"]:
            self.sections.begin()
        self._started = clocks()

    def _report(self) -> None:
        found: dict[str, Any] = {"losses": self.losses}
        if hasattr(self, "_started"):
            seconds, cpu_seconds = (now - before for now, before in zip(clocks(), self._started, strict=True))
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}
            if self._asked["profile"]:
                spent = {name: seconds - self._threads.get(name, 0.0) for name, seconds in threads().items()}
                found |= {"sections": self.sections.end(), "threads": spent}
            if self._profiler:
                self._profiler.stop()
                self._profiler.export_chrome_trace(self._asked["trace"])
                found["operators"] = operators(self._profiler, self.sections.names)
                self._profiler = None
        print(json.dumps(found), file=self._told, flush=True)
        self.losses = []


def operators(profiler: torch.profiler.profile, sections: set[str]) -> list[tuple[str, int, float]]:
    """(name, calls, seconds without what it calls) of the dearest of torch's operators."""
    events = [event for event in profiler.key_averages() if event.key not in sections]
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.count, event.self_cpu_time_total / 1e6) for event in events[:OPERATORS]]


def ours(gate: Gate, overrides: list[str]) -> None:
    """The training program itself, as its launchers start it; its steps pass the gate."""
    from pretrain.engine.engine import Engine

    step = Engine.step

    def gated(self: Engine, *args, **kwargs):
        gate(lambda: watches_of(self))
        return step(self, *args, **kwargs)

    Engine.step = gated
    for name in COLLECTIVES:  # before DeepSpeed takes hold of them
        gate.sections.watch(torch.distributed, name, "communication")
    sys.argv = ["pretrain.train", *overrides]
    runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)


def watches_of(engine: Any) -> Iterator[tuple]:
    """What stands for which part of a step, from the loop down to torch."""
    from pretrain import dist, loop
    from pretrain.report.log import Log

    yield from ((loop, name, "data") for name in ("ahead", "on_device"))
    yield engine, "loss_rows", "forward"
    yield engine.engine, "backward", "backward"
    zero = engine.layout.optimizer
    yield from ((zero, name, "backward: gradients taken in") for name in TAKES_GRADIENT if hasattr(zero, name))
    yield engine.engine, "step", "optimizer: norm, clipping, copies"
    yield engine.layout.torch_optimizer, "step", "optimizer: update"
    yield from ((Log, name, "logging") for name in ("row", "event"))
    yield from ((dist.LateSum, name, "waiting") for name in ("on_device", "read"))


def other(name: str, gate: Gate, overrides: list[str], rows: int) -> None:
    import bench_train_others as others  # the files beside this one
    import bench_train_peers as peers

    config = compose.compose("pretrain", overrides)
    dtype = hardware.dtype_for(config.train.precision, torch.device("cpu"))
    (others.CONTESTANTS | peers.CONTESTANTS)[name](gate, config, others.batches(config, rows), dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant")
    parser.add_argument("facts", metavar="JSON", type=json.loads)
    args = parser.parse_args()
    if args.contestant == "ours":
        ours(Gate(), args.facts["overrides"])
    else:
        other(args.contestant, Gate(), args.facts["overrides"], args.facts["rows"])
