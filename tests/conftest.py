"""Markers, and the data and launches that tests share."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import cli
from pretrain.hub import reference
from tests import forked
from tests.forked import ROOT
from tests.slurm_cluster import SlurmCluster, why_not

TINY = [
    "model=llama_tiny", "train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=2",
    "train.precision=fp32", "schedule=constant", "schedule.warmup_steps=5", "optim.lr=3e-3", "log=none",
    "log.sample_tokens=4", "train.eval_samples=13",
]  # fmt: skip
LENGTH = ("train.steps=24", "train.save_every=5", "train.eval_every=8")
# Files that take minutes, the longest first.
LONG = ["readme", "launch", "parts", "finetune", "slurm", "train", "convert", "evaluate", "engine", "validation",
        "faults", "bench", "train_data"]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and what a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None) and "FORKED" not in os.environ:
        forked.start_server()  # one for all processes; it imports while they do
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # others have the other cores, and threads that wait for each other take ages
    config.addinivalue_line("markers", "slow: takes minutes; run by `launch/test.sh -m slow`")
    config.addinivalue_line("markers", "slurm: needs Slurm's daemons (apt: slurm-wlm munge slurmctld slurmd)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONG files first, so that processes that share the files end at about the same time."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What training processes of tests run in."""
    return forked.ENVIRONMENT


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
        line = forked.program(ROOT / "tools" / command[0], *command[1:])
        subprocess.run(line, env=environment, check=True, capture_output=True, timeout=600)
    return folder / "data"


def checkout_files() -> list[str]:
    """The files that git knows or would add: what a clone would have, and nothing that a build left behind."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def copy_checkout(folder: Path) -> Path:
    """Copy them to another folder, as a clone would have them."""
    for name in checkout_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def worker(environment, tmp_path_factory):
    """Run tests/dist/NAME on some ranks to its end; returns what it wrote as JSON to its last argument."""

    def run(name: str, *arguments: object, ranks: int = 2) -> Any:
        out = tmp_path_factory.mktemp(Path(name).stem) / "out.json"
        line = forked.program(ROOT / "tests" / "dist" / name, *arguments, out, ranks=ranks)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(out.read_text())

    return run


def command(ranks: int, *overrides: str) -> list[str]:
    brings_model = any(override.startswith("init=") for override in overrides)
    tiny = TINY[1:] if brings_model else TINY
    return forked.program("-m", "pretrain.train", *tiny, *overrides, ranks=ranks)


@pytest.fixture(scope="session")
def train(shards, environment, tmp_path_factory):
    """Run the trainer to its end; returns the completed process."""
    root = tmp_path_factory.mktemp("runs")

    def run(ranks: int, *overrides: str, data=shards, check=True, **env: str) -> subprocess.CompletedProcess:
        line = command(ranks, f"run.root={root}", f"data.train={data}", f"data.val={data}", *overrides)
        env = environment | env
        return subprocess.run(line, env=env, capture_output=True, text=True, check=check, timeout=600)

    run.root = root
    run.shards = shards
    return run


@pytest.fixture(scope="session")
def undisturbed(train) -> Path:
    """The folder of a finished run on 2 ranks, that others are compared with: its journal and checkpoints stay."""
    train(2, "run.name=undisturbed", "deepspeed=zero1", *LENGTH)
    return train.root / "undisturbed"


@pytest.fixture(scope="session")
def tool(environment):
    """Run a tool of tools/ as a user does; returns the completed process."""

    def run(name: str, *arguments: object, check=True) -> subprocess.CompletedProcess:
        line = forked.program(ROOT / "tools" / name, *arguments)
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=check, timeout=600)

    return run


@pytest.fixture
def transformers_here(monkeypatch):
    """What transformers makes of an export it makes in this process, without the seconds that it takes to start one."""

    class InThisProcess:
        returncode = 0

        def __init__(self, command: list[str], **_):
            self.arguments = command[2:]

        def communicate(self) -> tuple[str, str]:
            monkeypatch.setattr(sys, "argv", self.arguments)
            reference.main()
            return "", ""

    monkeypatch.setattr(cli, "subprocess", SimpleNamespace(Popen=InThisProcess))


@pytest.fixture
def transformers_forked(monkeypatch):
    """The process in which transformers computes an export is forked from one that has imported it."""
    monkeypatch.setattr(sys, "executable", str(forked.python()))
    for name, value in forked.FIXED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Real Slurm daemons, where they are installed and the user is root."""
    if reason := why_not():
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
