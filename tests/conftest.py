"""Markers, and the data and launches that tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run by `launch/test.sh -m slow`")
    config.addinivalue_line("markers", "slurm: needs Slurm's daemons (apt: slurm-wlm munge slurmctld slurmd)")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What training processes of tests run in: this checkout's code, the CPU, one thread a rank."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A tokenizer and shards of a part of the standard library, written by the real tools, with a validation split."""
    folder = tmp_path_factory.mktemp("shards")
    stdlib = Path(os.__file__).parent
    texts = [str(stdlib / name) for name in ("json", "email", "unittest", "http")]
    for command in (
        ["train_tokenizer.py", "--input", *texts, "--vocab-size", "512", "--output", str(folder / "tokenizer.model")],
        ["write_shards.py", "--input", *texts, "--tokenizer", str(folder / "tokenizer.model"),
         "--output", str(folder / "data"), "--val-fraction", "0.2"],
    ):  # fmt: skip
        tool = [sys.executable, str(ROOT / "tools" / command[0]), *command[1:]]
        subprocess.run(tool, env=environment, check=True, capture_output=True, timeout=120)
    return folder / "data"


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command line of a launch on this machine, on a port of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]
