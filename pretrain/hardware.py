"""The machine: the precision it has in hardware, the peak that MFU divides by, the facts a run records."""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

# Dense bf16 tensor-core peak, FLOP/s, from the vendors' data sheets (the sparse figures are twice as high).
GPU_PEAK_BF16 = {
    "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of a precision
PACKAGES = (
    "torch", "deepspeed", "numpy", "sentencepiece", "webdataset", "safetensors", "hydra-core", "wandb", "matplotlib",
)  # fmt: skip


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` -> bf16 where the device multiplies it in hardware, else fp32; anything else stays."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if "avx512_bf16" in _cpuinfo() or "amx_bf16" in _cpuinfo() else "fp32"


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """What a model's weights are of that computes in this precision: auto, bf16 or fp32."""
    return DTYPES[resolve_precision(precision, device)]


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of one rank at best, where the figure comes from)."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, peak in GPU_PEAK_BF16.items():
            if known in name:
                return peak, f"{name}, dense bf16 data sheet"
    return _measured_matmul(device, precision), f"measured {precision} matrix product"


def _measured_matmul(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Best rate of a square matrix product on this rank's threads or GPU. All ranks measure at the same time.

    Sizes grow while there is time: one at which a processor without bf16 takes seconds is not begun.
    """
    best, deadline = 0.0, time.perf_counter() + seconds
    sizes = (128, 256, 512, 1024) if device.type == "cpu" else (2048, 8192)
    for size in sizes:
        a, took = torch.randn(size, size, device=device).to(DTYPES[precision]), 0.0
        while not took or (size == sizes[-1] and time.perf_counter() + took < deadline):
            start = time.perf_counter()
            for _ in range(4):
                a @ a
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            best = max(best, 4 * 2 * size**3 / took)
        if time.perf_counter() + 8 * took > deadline:
            break
    return best


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on: versions, processor, memory, GPUs, commit. Nothing from the environment."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **versions,
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of this checkout, with `+` when files differ; None in an installed wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a venv may lie inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
