"""The launchers: set-up's states, signals that must reach the training processes, exit codes, nothing left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.cli import STOPPED
from tests import forked
from tests.conftest import TINY
from tests.forked import ROOT
from tests.journals import exact, journal

SCRIPTS = [ROOT / ".ci" / "run", *sorted(path for path in (ROOT / "launch").iterdir() if path.name != "README.md")]
LAUNCHERS = ("torchrun", "deepspeed")


@pytest.fixture
def launch_environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "PYTHON": sys.executable, "NPROC": "2"}


@pytest.fixture
def stub_environment(launch_environment: dict[str, str]) -> dict[str, str]:
    return {**launch_environment, "MODULE": "tests.dist.stub_trainer"}


def start(launcher: str, *arguments: object, env: dict[str, str], cwd: Path) -> subprocess.Popen:
    command = [str(ROOT / "launch" / f"{launcher}.sh"), *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(done, process: subprocess.Popen, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def processes_naming(folder: Path) -> list[str]:
    """Ids and command lines of the live processes that work in or name a test's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if command and (str(folder) in command or os.readlink(entry / "cwd") == str(folder)):
                found.append(f"{entry.name} {command}")
        except OSError:
            continue
    return found


def both_started(folder: Path) -> bool:
    return all((folder / f"started-{rank}").exists() and (folder / f"started-{rank}").read_text() for rank in (0, 1))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_explains_itself(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    sourced = script.name in ("env.sh", "run.sh")
    assert sourced or (os.access(script, os.X_OK) or script.suffix == ".sbatch") and lines[0] == "#!/usr/bin/env bash"
    assert lines[0 if sourced else 1].startswith("# "), "opens with its purpose"


def test_second_interrupt_stops_at_once(tmp_path, stub_environment):
    process = start("torchrun", tmp_path, "stubborn", env=stub_environment, cwd=tmp_path)
    wait_until(lambda: both_started(tmp_path), process)
    process.send_signal(signal.SIGINT)
    time.sleep(2.1)  # a second one within a second counts as the same (`timeout` sends two)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=600)[0]
    assert process.returncode not in (0, 1), output
    assert processes_naming(tmp_path) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_launcher_is_a_failure_and_leaves_no_process(launcher, tmp_path, stub_environment):
    process = start(launcher, tmp_path, "stubborn", env=stub_environment, cwd=tmp_path)
    wait_until(lambda: both_started(tmp_path), process)
    worker = int((tmp_path / "started-0").read_text())
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    output = process.communicate(timeout=600)[0]
    assert process.returncode not in (0, 2), output
    assert processes_naming(tmp_path) == []


@pytest.mark.parametrize(
    ("launcher", "sent", "received"), [("torchrun", "USR1", "SIGUSR1"), ("deepspeed", "INT", "SIGTERM")]
)
def test_two_nodes_on_one_host(launcher, sent, received, tmp_path, stub_environment):
    """NNODES and NODE_RANK join two launches; the ranks count on; a signal to each reaches its rank and stops it."""
    env = {**stub_environment, "NPROC": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}
    nodes = [start(launcher, tmp_path, env={**env, "NODE_RANK": str(n)}, cwd=tmp_path) for n in (0, 1)]
    wait_until(lambda: both_started(tmp_path), nodes[0])
    for node in nodes:
        node.send_signal(signal.Signals[f"SIG{sent}"])
    assert [node.communicate(timeout=600) and node.returncode for node in nodes] == [0, 0]
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [received] * 2
    assert processes_naming(tmp_path) == []


def test_help_is_printed_once(tmp_path, stub_environment):
    process = start("torchrun", "--help", env=stub_environment, cwd=tmp_path)
    assert process.communicate(timeout=600)[0] == "help\n"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "0"}, "at least 1"),
        ({"NNODES": "2"}, "needs MASTER_ADDR"),
        ({"NODE_RANK": "1"}, "below NNODES=1"),
        ({"PYTHON": "/nowhere/python"}, "launch/setup.sh"),
    ],
)
def test_bad_setting_is_one_message(setting, words, tmp_path, stub_environment):
    process = start("torchrun", tmp_path, env={**stub_environment, **setting}, cwd=tmp_path)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 2 and output.count("\n") == 1 and output.startswith("error: ") and words in output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_bad_config_is_one_message(launcher, tmp_path, launch_environment):
    env = launch_environment | {"PYTHON": str(forked.python())}
    process = start(launcher, "run.name=x", "train.stepz=3", env=env, cwd=tmp_path)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 2, output
    assert output.count("error:") == 1 and "train.stepz" in output and "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("launcher", "sent"), [("torchrun", "TERM"), ("deepspeed", "USR1")])
def test_training_saves_and_stops(launcher, sent, tmp_path, shards, undisturbed, launch_environment):
    """Two real ranks: on the signal they save the step they are at, and the script ends with the code of that, torchrun
    reports no failure. Their steps are those of a forked run (`undisturbed`) to the last bit.
    """
    data = (f"data.train={shards}", f"data.val={shards}", "deepspeed=zero1")
    arguments = (*TINY, "run.name=signalled", *data, "train.steps=100000", "train.save_every=0", "train.eval_every=8")
    process = start(launcher, *arguments, env=launch_environment, cwd=tmp_path)
    run = tmp_path / "runs" / "signalled"
    rows = run / "metrics.jsonl"
    wait_until(lambda: rows.exists() and rows.read_text().count("\n") >= 3, process)
    process.send_signal(signal.Signals[f"SIG{sent}"])
    output = process.communicate(timeout=600)[0]
    assert process.returncode == STOPPED and "ChildFailedError" not in output, output
    found = journal(run)
    last = found[-1]["step"]
    both = min(last - 1, 24)  # a run that must stop does not evaluate first
    assert exact(found)[:both] == exact(journal(undisturbed))[:both]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:09d}"]
    assert processes_naming(tmp_path) == []


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*)
        printf '%b' "${PIP_SAYS:-}"
        sleep "${PIP_SECONDS:-0}"
        exit "${PIP_EXIT:-0}" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class SetUp:
    """setup.sh in a copied checkout with a Python that only notes what it is asked to install."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder / "checkout", folder / "calls"
        (self.folder / "launch").mkdir(parents=True)
        for name in ("launch/setup.sh", "setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        (folder / "python").write_text(FAKE_PYTHON)
        (folder / "python").chmod(0o755)
        self.env = {**os.environ, "BASE_PYTHON": str(folder / "python"), "CALLS": str(self.calls)}
        self.env["REAL_PYTHON"] = sys.executable

    def run(self, *arguments: str, **env: str) -> tuple[int, str, bool, bool]:
        """Exit code, output, whether it made a venv, whether it installed."""
        self.calls.write_text("")
        done = subprocess.run(
            [self.folder / "launch" / "setup.sh", *arguments], env={**self.env, **env}, cwd="/", text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        calls = self.calls.read_text()
        return done.returncode, done.stdout, "-m venv" in calls, "-m pip" in calls


def test_set_up_installs_once_and_again_after_a_change(tmp_path):
    set_up = SetUp(tmp_path)
    code, output, made, installed = set_up.run()
    assert (code, made, installed) == (0, True, True), output
    assert set_up.run() == (0, "", False, False)
    with open(set_up.folder / "constraints.txt", "a") as file:
        file.write("# changed\n")
    code, output, made, installed = set_up.run()
    assert (code, made, installed) == (0, False, True) and "has changed" in output
    assert set_up.run() == (0, "", False, False)


def test_set_up_installs_what_is_optional_when_asked_to(tmp_path):
    set_up = SetUp(tmp_path)
    assert set_up.run()[0] == 0 and ".[hf] " in set_up.calls.read_text()
    code, output, made, installed = set_up.run("all")
    assert (code, made, installed) == (0, False, True) and "adding what is optional" in output
    assert ".[http,s3,hf,prepare,tasks,eval,dev] " in set_up.calls.read_text()
    assert set_up.run("all") == set_up.run() == (0, "", False, False)
    with open(set_up.folder / "constraints.txt", "a") as file:
        file.write("# changed\n")
    assert set_up.run()[0] == 0 and ",eval," in set_up.calls.read_text(), "what was there is brought up to date"
    assert set_up.run("most")[:2] == (1, "set-up: launch/setup.sh most: the one argument it takes is 'all'\n")


def test_set_up_says_what_it_does_and_not_what_pip_does(tmp_path):
    """A line every five seconds without a terminal, and when it fails the end of what pip said."""
    set_up = SetUp(tmp_path)
    ignored = "WARNING: Location 'file:///index/it/' is ignored: it is neither a file nor a directory.\n"
    says = ignored + "Collecting torch==2\n  Downloading torch.whl\n"
    code, output, _, _ = set_up.run(PIP_SAYS=says, PIP_SECONDS="6")
    assert code == 0 and ignored not in output
    lines = [line for line in output.splitlines() if re.match(r"set-up: \d+ s: ", line)]
    assert len(lines) == 1 and lines[0].endswith(" s: Downloading torch.whl")
    (set_up.folder / ".venv" / "bin" / "python").unlink()
    code, output, _, _ = set_up.run(PIP_SAYS=ignored + "ERROR: no torch for this\n", PIP_EXIT="1")
    assert code == 1 and "ERROR: no torch for this" in output and ignored not in output


def test_set_up_cut_short_starts_over(tmp_path):
    set_up = SetUp(tmp_path)
    assert set_up.run(PIP_EXIT="1")[0] == 1
    code, output, made, installed = set_up.run()
    assert (code, made, installed) == (0, True, True) and "starting over" in output
    (set_up.folder / ".venv" / "bin" / "python").unlink()
    code, output, made, installed = set_up.run()
    assert (code, made, installed) == (0, True, True) and "starting over" in output


def test_set_up_refuses_what_it_cannot_use(tmp_path):
    set_up = SetUp(tmp_path)
    code, output, _, _ = set_up.run(BASE_PYTHON="/nowhere/python3")
    assert code == 1 and "Python 3.10" in output
    foreign = set_up.folder / ".venv" / "mine"
    foreign.parent.mkdir()
    foreign.write_text("precious")
    code, output, made, installed = set_up.run()
    assert (code, made, installed) == (1, False, False) and "not made by this script" in output
    assert foreign.read_text() == "precious"


def test_set_up_waits_for_another(tmp_path):
    set_up = SetUp(tmp_path)
    commands = [subprocess.Popen([set_up.folder / "launch" / "setup.sh"], env=set_up.env) for _ in range(3)]
    assert [command.wait(600) for command in commands] == [0, 0, 0]
    assert set_up.calls.read_text().count("-m venv") == set_up.calls.read_text().count("-m pip") == 1


def test_the_gpus_are_those_that_torch_can_use(tmp_path):
    """nvidia-smi may be there without them, and they without nvidia-smi."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: something'\n")
    (tmp_path / "python").write_text("#!/bin/sh\necho $TORCH_SEES\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("NPROC", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GLIBC_TUNABLES")
    }
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    line = ["bash", "-euc", f"source {ROOT}/launch/env.sh; echo $NPROC ${{DS_ACCELERATOR:-no}} ${{GLIBC_TUNABLES:-no}}"]
    on_cpu = "cpu glibc.malloc.hugetlb=1"
    ranks = str(numa_nodes())
    for said, more, expected in (
        ("3", {}, "3 no no"), ("0", {}, f"{ranks} {on_cpu}"), ("", {}, f"{ranks} {on_cpu}"),
        ("3", {"CUDA_VISIBLE_DEVICES": ""}, f"{ranks} {on_cpu}"),
    ):  # fmt: skip
        done = subprocess.run(line, env=env | {"TORCH_SEES": said} | more, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr


def test_cores_are_shared_out_among_ranks_and_one_alone_tries_how_many_it_takes():
    """nproc itself obeys OMP_NUM_THREADS, which a script around the launcher may have set."""
    cores, others = len(os.sched_getaffinity(0)), ("NPROC", "NNODES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    env = {key: value for key, value in os.environ.items() if key not in others}
    line = ["bash", "-c", f"source {ROOT}/launch/env.sh; echo $NPROC ${{OMP_NUM_THREADS:-tried}}"]
    shared = str(max(1, cores // 2))
    for more, expected in (
        ({}, [str(numa_nodes()), "tried" if numa_nodes() == 1 else str(cores // numa_nodes())]),
        ({"NPROC": "1"}, ["1", "tried"]), ({"NPROC": "2"}, ["2", shared]),
        ({"NPROC": "1", "NNODES": "2"}, ["1", str(cores)]), ({"OMP_NUM_THREADS": "3"}, [str(numa_nodes()), "3"]),
    ):  # fmt: skip
        said = subprocess.run(line, env={**env, **more, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
        assert said.stdout.split() == expected


def numa_nodes() -> int:
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return min(max(len(nodes), 1), len(os.sched_getaffinity(0)))
