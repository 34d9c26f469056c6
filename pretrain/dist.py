"""Rank, world and the few collectives outside the engine: barrier, gather, agreement. No DeepSpeed here.

Without a process group the collectives are those of one rank.

torchrun, the deepspeed launcher and `launch/slurm.sbatch` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; without them the process is a world of its own.
"""

import hashlib
import json
import os
import re
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from pretrain.cli import FAILED, FINISHED
from pretrain.network import interface_to

TIMEOUT = timedelta(minutes=30)  # of a collective while ranks load, and of the background's
STEP_TIMEOUT = "PRETRAIN_STEP_TIMEOUT"  # the environment variable for another one, once steps run
STEP_SECONDS = "600"
INTERFACE = "GLOO_SOCKET_IFNAME"
EXIT_CODE = "PRETRAIN_EXIT_CODE"  # the environment variable that names the file for a code
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what launchers set, and a process alone has
UNSET = ("start the run with a launcher (launch/torchrun.sh, launch/slurm.sbatch), which sets all of them, or alone, "
         "after `unset RANK WORLD_SIZE LOCAL_RANK`")  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = Ranks(0, 1, 0)


def from_environment(is_launched: bool = False) -> Ranks:
    """Ranks as the launcher's environment variables say; one process alone without them.

    `ValueError` for values that no launcher sets; `is_launched`: also for what one has left behind.
    """
    step_timeout()
    found = {key: os.environ.get(key, default) for key, default in LAUNCHED.items()}
    for key, value in found.items():
        if not re.fullmatch("[0-9]+", value):
            raise ValueError(f"{key}={value} in the environment is no whole number: {UNSET}")
    rank, world_size, local_rank = map(int, found.values())
    if rank >= max(world_size, 1) or not world_size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment do not fit: {UNSET}")
    if is_launched and (missing := [key for key in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]):
        if left := [key for key in LAUNCHED if key in os.environ]:
            said = ", ".join(f"{key}={os.environ[key]}" for key in left)
            raise ValueError(f"{said} in the environment, without {', '.join(missing)}: {UNSET}")
    return Ranks(rank, world_size, local_rank)


def device_of(ranks: Ranks = ALONE) -> torch.device:
    """This rank's GPU, or the CPU. A process alone, such as a tool's, needs no process group besides.

    A rank that sees one GPU has that, whatever its LOCAL_RANK (srun --gpus-per-task=1 shows each its own); of several,
    that of its LOCAL_RANK. `ValueError` where there is none for it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if 1 < seen <= ranks.local_rank:
        raise ValueError(f"LOCAL_RANK={ranks.local_rank}, and this rank sees {seen} GPUs: start at most {seen} ranks "
                         f"on a node (NPROC={seen}; on Slurm --ntasks-per-node={seen})")  # fmt: skip
    return torch.device("cuda", ranks.local_rank if seen > 1 else 0)


def start(ranks: Ranks) -> torch.device:
    """Join the process group (gloo for CPU tensors, NCCL for CUDA ones) and return this rank's device.

    `ValueError` when another process has the port of the group.
    """
    spare_sockets()
    alone = {}
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        alone = {"store": torch_dist.HashStore(), "rank": 0, "world_size": 1}  # needs no port, that another might take
    elif INTERFACE not in os.environ and (found := interface_to(os.environ["MASTER_ADDR"])):
        os.environ[INTERFACE] = found  # gloo would take that of the host's own name, which may lead nowhere
    device = device_of(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes its device from this
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        torch_dist.init_process_group(backend, timeout=TIMEOUT, **alone)
    except torch_dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ValueError(f"MASTER_PORT={port} is in use on this host, perhaps by another run: choose another, as "
                         f"MASTER_PORT={int(port) + 1}") from None  # fmt: skip
    if device.type == "cuda" and (shared := shared_gpus(all_gather_objects([socket.gethostname(), gpu_id(device)]))):
        raise ValueError(shared)
    return device


def spare_sockets() -> None:
    """Let gloo connect two ranks when they first have something to say, and this process have all the files it may:
    every group would connect each rank with all, and 1,024 open files are the usual limit. Rank 0 also holds a
    connection to each rank, of the store that they meet at.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def gpu_id(device: torch.device) -> str:
    """What tells a GPU from all others."""
    return str(torch.cuda.get_device_properties(device).uuid)


def shared_gpus(places: list[list[str]]) -> str | None:
    """What is wrong where two ranks have one GPU, of the [host, GPU] of each rank; None where none have."""
    ranks: dict[tuple, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(tuple(place), []).append(rank)
    for (host, _), those in ranks.items():
        if len(those) > 1:
            return (f"ranks {', '.join(map(str, those))} have the same GPU on {host}: start one rank a GPU (NPROC; on "
                    "Slurm --ntasks-per-node as --gpus-per-node, or --gpus-per-task=1)")  # fmt: skip
    return None


def new_cpu_group() -> torch_dist.ProcessGroup:
    """A group of its own for a background thread, so that its collectives never mix with the training's."""
    return torch_dist.new_group(backend="gloo", timeout=TIMEOUT)


def step_timeout() -> timedelta:
    """How long a rank may keep the others waiting once steps run."""
    seconds = os.environ.get(STEP_TIMEOUT, STEP_SECONDS)
    if not re.fullmatch("[1-9][0-9]*", seconds):
        raise ValueError(f"{STEP_TIMEOUT}={seconds} in the environment is no number of seconds: give one, as 600")
    return timedelta(seconds=int(seconds))


def expect_steps() -> None:
    """From now on a rank that does not answer for `step_timeout` hangs, and the others end: loading is over."""
    if torch_dist.is_initialized():
        distributed_c10d._set_pg_timeout(step_timeout())


def is_timeout(error: RuntimeError) -> bool:
    """Whether it is gloo's, for a rank that does not answer. (NCCL's watchdog ends the process itself.)"""
    return "Timed out waiting" in str(error)


def barrier() -> None:
    torch_dist.barrier()


def all_gather_objects(value: Any, group: torch_dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON-like `value`, in rank order, on every rank."""
    if not torch_dist.is_initialized():
        return [value]
    values = [None] * torch_dist.get_world_size(group)
    torch_dist.all_gather_object(values, value, group=group)
    return values


def agree(action: Callable[[], object], group: torch_dist.ProcessGroup | None = None) -> str | None:
    """Run `action` on every rank; the first error of any of them in words, the same on all, or None."""
    error = None
    try:
        action()
    except Exception as failure:  # whatever it is, the other ranks must hear of it instead of waiting
        error = f"{type(failure).__name__}: {failure}"
    return next(filter(None, all_gather_objects(error, group)), None)


def all_gather_tensor(values: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> torch.Tensor:
    """Every rank's tensor of one shape, stacked: [world, *shape], by the group of its device or by `group`."""
    if not torch_dist.is_initialized():
        return values[None]
    gathered = values.new_empty((torch_dist.get_world_size(group), *values.shape))
    torch_dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=group)
    return gathered


def send_json(value: Any, rank: int, group: torch_dist.ProcessGroup) -> None:
    """Send a JSON-like value to one rank, which calls `receive_json`."""
    data = torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)
    torch_dist.send(torch.tensor([len(data)]), rank, group=group)
    torch_dist.send(data, rank, group=group)


def receive_json(rank: int, group: torch_dist.ProcessGroup) -> Any:
    """What `rank` sends by `send_json`."""
    size = torch.zeros(1, dtype=torch.int64)
    torch_dist.recv(size, rank, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    torch_dist.recv(data, rank, group=group)
    return json.loads(data.numpy().tobytes())


def this_node() -> int:
    """A number that tells the machine of this process from all others, the same for its containers of one name."""
    booted = Path("/proc/sys/kernel/random/boot_id")  # hosts that all have the same name differ by this
    name = socket.gethostname() + (booted.read_text(encoding="utf-8") if booted.exists() else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(values)
    return values


class HostCopy:
    """A copy of a tensor on the host, under way: `read` waits for it, and not for what the device is given since."""

    def __init__(self, values: torch.Tensor):
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class LateSum:
    """The sum over the ranks of a few numbers on this rank's device: begun now, read when other work is in hand."""

    def __init__(self, values: torch.Tensor):
        self._values, self._copy = values, None
        self._work = torch_dist.all_reduce(values, async_op=True) if torch_dist.is_initialized() else None

    def on_device(self) -> torch.Tensor:
        """The sum, for computations on the device. On a GPU the host does not wait for it."""
        if self._copy is None:
            if self._work is not None:
                self._work.wait()  # on a GPU it is the stream that waits
            self._copy = HostCopy(self._values)
        return self._values

    def read(self) -> list[float]:
        self.on_device()
        return self._copy.read().tolist()


def finish(code: int, is_agreed: bool = True, last: Callable[[], bool] = lambda: True) -> None:
    """Leave at once with this exit code: gloo's teardown now and then aborts a process whose work is done.

    `is_agreed`: every rank comes here with the same code, if it is not that of a failure; they leave together then.
    `last` is what this rank has still to do by itself, and whether that went well. The others do not wait for it, or
    GPUs would stand idle; only where their code would have a launcher end this rank too, they do.

    A script of launch/ names a file for a code that is neither success nor failure. Where the ranks agree, its launcher
    sees success then: torchrun would make 1 of the code, and srun would end the ranks that are a moment later. So does
    a torchrun that starts again what it takes for a failure.
    """
    is_agreed = is_agreed and torch_dist.is_initialized() and code != FAILED
    told, restarts = os.environ.get(EXIT_CODE), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if told and code not in (FINISHED, FAILED) and os.path.exists(told):  # not on the other nodes of a Slurm job
        with open(told, "a", encoding="utf-8") as file:
            file.write(f"{code}\n")
    if is_agreed and (told or restarts != "0"):
        code = FINISHED
    others_first = code == FINISHED
    if is_agreed and others_first:
        barrier()
    went_well = last()
    if is_agreed and not others_first:
        barrier()
    if not went_well:
        code = FAILED
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "drain", stream.flush)()
    os._exit(code)
