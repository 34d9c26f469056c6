"""How many threads a rank computes with on a CPU."""

import os
import time
from pathlib import Path

import torch

from pretrain import dist, files

SET = "OMP_NUM_THREADS"  # by the user, or by a launcher of several ranks
TIMES, PATIENCE = 5, 5.0  # a number of threads is tried so often; seconds until others leave the cores to it
OWN = 0.8  # the share of its cores' time that a trial has, or others took them
WORTH = 0.9  # fewer threads must take less than this share of the time


def settle(folder: Path, ranks: dist.Ranks, device: torch.device) -> int:
    """Threads of this rank from here on. Where nobody has said how many, and no other rank shares the machine: as many
    as the run in `folder` had, so that it computes the same bits; or as are fastest here.
    """
    if _is_free(ranks, device):
        cores, recorded = _cores(), _recorded(folder)
        torch.set_num_threads(recorded if recorded and recorded <= cores else fastest(cores))
    return torch.get_num_threads()


def note(ranks: dist.Ranks, device: torch.device) -> str | None:
    """What to say where fewer threads were settled than there are cores: others may have computed only then."""
    count, cores = torch.get_num_threads(), _cores()
    if not _is_free(ranks, device) or count >= cores:
        return None
    return (f"this run computes with {count} of {cores} threads, which were the fastest as it began: "
            f"{SET}={cores} takes all")  # fmt: skip


def _is_free(ranks: dist.Ranks, device: torch.device) -> bool:
    return device.type == "cpu" and not os.environ.get(SET) and ranks.world_size == 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _recorded(folder: Path) -> int | None:
    """Of the last start of the run there as one rank on a CPU."""
    found = None
    for event in files.read_lines(folder / "events.jsonl"):
        if event.get("kind") in ("start", "resume") and event.get("device") == "cpu" and event.get("ranks") == 1:
            found = event.get("threads")
    return found if type(found) is int and found > 0 else None


def fastest(cores: int) -> int:
    """All `cores`, or the half, a quarter ... of them that computes faster: two hyperthreads of a core are not two
    cores, and a container may see more of them than it has. Below a second on a machine that does nothing else; threads
    that wait for one whose core is taken are slow, so a trial that others disturb is repeated for some seconds.
    """
    counts = [cores >> power for power in range(cores.bit_length())]
    seconds, rounds, deadline = dict.fromkeys(counts, float("inf")), 0, time.perf_counter() + PATIENCE
    is_disturbed = True
    while rounds < TIMES or (is_disturbed and time.perf_counter() < deadline):
        rounds, is_disturbed = rounds + 1, False
        for count in counts:
            torch.set_num_threads(count)
            _work(rows=64)  # its threads start
            start, computed = time.perf_counter(), time.process_time()
            _work(rows=1024)
            took, computed = time.perf_counter() - start, time.process_time() - computed
            seconds[count] = min(seconds[count], took)
            is_disturbed |= computed < OWN * count * took
    best = cores
    for count in counts:
        if seconds[count] < WORTH * seconds[best]:
            best = count
    return best


def _work(rows: int, width: int = 256) -> torch.Tensor:
    """As in a small model's step: matrix products, and about as much time element by element."""
    x, up, down = torch.ones(rows, width), torch.ones(width, 4 * width), torch.ones(4 * width, width)
    for _ in range(2):
        x = x + torch.softmax(torch.nn.functional.silu(x @ up), 1) @ down
    return x
