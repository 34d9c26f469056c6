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

# Dense bf16 peak with fp32 sums of one device, FLOP/s, from the vendors' data sheets (most print the sparse figure,
# twice as high). A name is known by the longest of these whose words it has; a form that is not here is measured.
GPU_PEAK_BF16 = {
    "A30": 165e12, "A40": 150e12, "A100": 312e12, "A800": 312e12, "A10": 125e12, "A10G": 70e12, "L4": 121e12,
    "L40": 181e12, "L40S": 362e12, "H20": 148e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H800": 989e12, "H800 PCIe": 756e12, "H200": 989e12, "H200 NVL": 835e12, "GH200": 989e12, "B100": 1750e12,
    "B200": 2250e12, "GB200": 2500e12, "B300": 2250e12, "GB300": 2500e12, "RTX 3090": 71e12, "RTX 4090": 165e12,
    "RTX 5090": 209e12, "MI210": 181e12, "MI250X": 191e12, "MI300A": 980e12, "MI300X": 1307e12, "MI325X": 1307e12,
}  # fmt: skip
OTHER_FORMS = {"Laptop", "Max", "MIG", "Ti", "SUPER", "D"}  # words of cards that are less or more than their namesakes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of a precision
PRECISIONS = ("bf16", "fp16", "fp32")
PACKAGES = (
    "torch", "deepspeed", "numpy", "sentencepiece", "webdataset", "safetensors", "hydra-core", "wandb", "matplotlib",
)  # fmt: skip


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` -> bf16 where the device multiplies it in hardware, else fp32; anything else stays. `ValueError` for bf16
    on a GPU that only emulates it, and for fp16 on such a processor.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise ValueError(f"train.precision=bf16: {torch.cuda.get_device_name(device)} has it in software only, "
                             "several times slower than fp32: take fp16 or fp32")  # fmt: skip
        return ("bf16" if has_bf16 else "fp32") if precision == "auto" else precision
    if precision != "auto":
        if precision == "fp16" and not _has_fp16():
            raise ValueError("train.precision=fp16: this processor has it in software only: take bf16 or fp32")
        return precision
    return "bf16" if "avx512_bf16" in _cpuinfo() or "amx_bf16" in _cpuinfo() else "fp32"


def _has_fp16() -> bool:
    """Whether this processor multiplies fp16 in hardware, as DeepSpeed asks torch."""
    try:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except AttributeError:  # a torch without oneDNN
        return False


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


def set_deterministic(is_wanted: bool) -> None:
    """Have torch compute the same bits each time on a GPU too, or fail where it cannot; before anything is computed. A
    CPU does so anyway.
    """
    torch.use_deterministic_algorithms(is_wanted)
    torch.backends.cudnn.benchmark = False
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of NVIDIA's cuBLAS documentation, reproducibility


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """What a model's weights are of that computes in this precision: auto, bf16, fp16 or fp32."""
    return DTYPES[resolve_precision(precision, device)]


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of one rank at best, where the figure comes from)."""
    measured = f"measured {precision} matrix product"
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        if known := known_gpu(name):
            return GPU_PEAK_BF16[known], f"{name}: data sheet of {known}, dense bf16"
        measured = f"{name} is not in the table of peaks: {measured}"
    return _measured_matmul(device, precision), measured


def known_gpu(name: str) -> str | None:
    """The entry of `GPU_PEAK_BF16` for a device of this name; None where there is none."""
    words = set(re.findall("[A-Za-z0-9]+", name))
    fits = [known for known in GPU_PEAK_BF16 if words >= set(known.split())]
    return max(fits, key=len, default=None) if not words & OTHER_FORMS else None


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
