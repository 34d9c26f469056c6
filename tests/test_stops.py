"""How a run ends before its end, and what its exit code says: signals, a launcher that is gone, a run that is held."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import cli, run_folder
from pretrain.cli import HELD, STOPPED
from tests import forked
from tests.conftest import command
from tests.journals import events, journal
from tests.test_train import wait_for_rows


@contextlib.contextmanager
def training(train, environment, name: str, ranks: int = 1, **settings: str) -> Iterator[subprocess.Popen]:
    """A run without an end that has trained three steps; it is stopped at last, if nobody did."""
    where = (f"run.root={train.root}", f"data.train={train.shards}", f"run.name={name}", "train.steps=100000")
    process = subprocess.Popen(
        command(ranks, *where), env=environment | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_rows(train.root / name, 3, process)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=600)


def test_a_run_is_trained_by_one_process_at_a_time(train, environment, tmp_path):
    told, folder = tmp_path / "code", train.root / "held"
    where = (f"run.root={train.root}", f"data.train={train.shards}", "run.name=held", "train.steps=100000")
    with training(train, environment, "held") as first:
        holder = f"process {forked.ranks_of(first.pid)[0]} on {socket.gethostname()}"
        kept = {path: path.read_bytes() for path in folder.iterdir() if path.name in ("config.yaml", "events.jsonl")}
        told.touch()
        for ranks, more in ((1, ()), (2, ()), (1, ("--check",))):
            env = environment | ({"PRETRAIN_EXIT_CODE": str(told)} if ranks == 2 else {})
            second = subprocess.run(command(ranks, *where, *more), env=env, capture_output=True, text=True)
            assert second.stderr.count("\n") == 1 and second.returncode == (HELD if ranks == 1 else 0), second.stderr
            assert f"error: {folder} is being trained by {holder}: wait until it ends" in second.stderr
        assert told.read_text().split() == [str(HELD)] * 2, "its ranks agree, and what started the launcher is told"
        assert {path: path.read_bytes() for path in kept} == kept and first.poll() is None
        first.terminate()
        assert first.wait(600) == STOPPED
    assert train(1, "run.name=held", "train.steps=1", check=False).returncode == 0, "the lock went with its process"


def test_a_restart_waits_for_what_is_left_of_its_launch(train, environment):
    """Slurm queues a job again while ranks of it may still be saving."""
    where = (f"run.root={train.root}", f"data.train={train.shards}", "run.name=restarted", "train.steps=100000")
    job = {"SLURM_JOB_ID": "17"}
    with training(train, environment, "restarted", **job) as first:
        holder = f"process {forked.ranks_of(first.pid)[0]} on {socket.gethostname()} (Slurm job 17)"
        other = environment | {"SLURM_JOB_ID": "18", "SLURM_RESTART_COUNT": "1"}
        refused = subprocess.run(command(1, *where), env=other, capture_output=True, text=True)
        assert refused.returncode == HELD and f"is being trained by {holder}" in refused.stderr
        restart = environment | job | {"SLURM_RESTART_COUNT": "1"}
        second = subprocess.Popen(command(1, *where, "--check"), env=restart, stderr=subprocess.PIPE, text=True)
        said = second.stderr.readline()
        assert said == f"waiting until {holder} ends, of which this is a restart\n" and first.poll() is None
        first.terminate()
        assert second.wait(600) == 0, "it went on when its predecessor had ended"
        second.communicate()


def test_a_signal_is_answered_at_once(train, environment):
    with training(train, environment, "answered") as process:
        os.kill(forked.ranks_of(process.pid)[0], signal.SIGINT)
        said = iter(process.stdout.readline, "")
        told = next(line for line in said if line.startswith("SIG"))
        assert told.startswith(
            "SIGINT: the run saves within two steps and stops (Ctrl-C again: at once, unsaved); the same"
        )
        assert process.wait(600) == STOPPED
    (stop,), saves = (events(train.root / "answered", kind) for kind in ("stopped", "saved"))
    assert (stop["reason"], stop["step"]) == ("SIGINT", saves[-1]["step"])


def test_ranks_stop_when_their_launcher_is_gone(train, environment):
    where = (f"run.root={train.root}", f"data.train={train.shards}", "run.name=orphaned", "train.steps=100000")
    launch = subprocess.Popen(command(2, *where), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = train.root / "orphaned"
    wait_for_rows(folder, 3, launch)
    ranks = forked.ranks_of(launch.pid)
    parent = Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)
    launch.wait(600)
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    (stop,) = events(folder, "stopped")
    assert stop["reason"] == "the launcher is gone" and (folder / f"checkpoints/step-{stop['step']:09d}").is_dir()


def test_a_signal_before_the_first_step_needs_no_step(train, environment, tmp_path):
    (tmp_path / "code").touch()
    env = environment | {"PRETRAIN_EXIT_CODE": str(tmp_path / "code")}
    where = (f"run.root={train.root}", f"data.train={train.shards}", "run.name=early", "train.steps=100000")
    process = subprocess.Popen(command(2, *where), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = train.root / "early"
    while not (folder / "config.yaml").exists():  # the peak is being measured, the model built
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(forked.ranks_of(process.pid)[0], signal.SIGTERM)
    assert (process.wait(600), (tmp_path / "code").read_text()) == (0, f"{STOPPED}\n" * 2)
    (stop,) = events(folder, "stopped")
    assert (stop["reason"], stop["step"], journal(folder)) == ("SIGTERM", 0, [])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_the_data_is_opened_is_answered_at_once(environment, number):
    program = (
        "import os, signal, sys, time; from pretrain import entry; sys.argv[1:] = ['run.name=x', 'data.train=x']\n"
        f"entry.main('pretrain', lambda *_: (os.kill(os.getpid(), signal.{number}), time.sleep(600)))"
    )
    done = subprocess.run(forked.program("-c", program), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == STOPPED
    assert done.stderr == "interrupted before training began: nothing is lost, run the same command again\n"


FINISH = (
    "import os, sys; from pretrain import dist; from pretrain.cli import STOPPED\n"
    "ranks = dist.from_environment(); dist.start(ranks)\n"
    "if {waits} and ranks.rank: dist.all_gather_objects('still waiting')\n"
    "dist.finish(STOPPED, is_agreed={agreed})"
)


def finished(environment: dict[str, str], waits: bool, agreed: bool, **more: str) -> int:
    """The launcher's exit code for two ranks that stop, or for one that does while the other waits for it."""
    line = forked.program("-c", FINISH.format(waits=waits, agreed=agreed), ranks=2)
    return subprocess.run(line, env=environment | more, capture_output=True, timeout=600).returncode


def test_a_rank_that_stops_alone_does_not_wait_for_one_that_waits_for_it(environment):
    """Ctrl-C before training, in the middle of what the ranks agree on: they would wait for each other half an hour."""
    assert finished(environment, waits=True, agreed=False) == 1


def test_torchrun_does_not_restart_what_was_stopped_on_request(environment):
    assert finished(environment, waits=False, agreed=True) == 1, "what torchrun makes of 75"
    assert finished(environment, waits=False, agreed=True, TORCHELASTIC_MAX_RESTARTS="3") == 0


def test_a_restart_by_torchrun_is_known_inside_a_job_too(monkeypatch, capsys):
    for name, value in {"SLURM_JOB_ID": "5", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    own, other = (f"process 7 on n1 (Slurm job 5, torchrun {pid})" for pid in (os.getppid(), 1))
    held = [own, own, None]
    assert run_folder._without_predecessor(lambda: held.pop(0)) is None and held == []
    assert capsys.readouterr().err == f"waiting until {own} ends, of which this is a restart\n"
    assert run_folder._without_predecessor(lambda: other) == other, "another run of the same job"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run_folder._without_predecessor(lambda: own) == own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "interrupted\n"),  # all that there is was printed
        ({"tells": True}, "interrupted: no output was written; run the same command again\n"),
        ({"kept": "nothing was written"}, "interrupted: nothing was written; run the same command again\n"),
    ],
)
def test_a_tool_says_what_there_is_of_its_work(capsys, options, said):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.run_tool(main, **options)
    assert ended.value.code == STOPPED and capsys.readouterr().err == said


HELD_BACK = """
import sys
from types import SimpleNamespace as Facts
from pretrain import entry
from pretrain.config import compose
sys.argv[1:] = ["run.name=x", "data.train=x"]
config = compose.compose("pretrain", ["run.root={root}", "run.name=agreeing", "log.sample_tokens=0"])
entry.main("pretrain", lambda *_: Facts(config=config, identity={{}}, compiles=lambda device: False))
"""


def test_a_signal_while_the_ranks_agree_ends_them_at_once(train, environment):
    """The main rank waits for what is left of its launch, the other one for the main rank."""
    job = {"SLURM_JOB_ID": "19"}
    with training(train, environment, "agreeing", **job):
        program = HELD_BACK.format(root=train.root)
        line = forked.program("-c", program, ranks=2)
        env = environment | job | {"SLURM_RESTART_COUNT": "1"}
        both = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
        while "of which this is a restart" not in both.stderr.readline():
            assert both.poll() is None
        os.kill(forked.ranks_of(both.pid)[0], signal.SIGTERM)
        assert both.wait(600) == 1, "what torchrun makes of 75"
        assert "interrupted before training began" in both.communicate()[1]


ASKED = """
import sys, torch
real = torch.use_deterministic_algorithms
torch.use_deterministic_algorithms = lambda wanted: (print("deterministic:", wanted, flush=True), real(wanted))
from pretrain import entry, train
entry.main("pretrain", train.make_plan)
"""


def test_the_bar_says_what_takes_its_time_and_determinism_is_asked_for(train, environment):
    """The whole run on a terminal."""
    arguments = command(1, f"run.root={train.root}", f"data.train={train.shards}", f"data.val={train.shards}")
    where = arguments.index("pretrain.train") + 1
    more = ("run.name=terminal", "train.steps=2", "train.deterministic=true", "log.console=true", "log.sample_tokens=4")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # rows and columns
    line = forked.program("-c", ASKED, *arguments[where:], *more)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        screen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 4096):
                screen += piece
        os.close(ours)
        said = process.communicate(timeout=600)[0]
    assert "deterministic: True" in said and process.returncode == 0, said
    for doing in ("validating", "saving", "writing a sample text", "drawing the report"):
        assert doing.encode() in screen, (doing, screen, said)


def test_no_rank_waits_while_rank_0_writes_the_sample_and_the_report(train, environment):
    """The sample goes into a pipe, and the other rank has left before anybody reads it."""
    folder = train.root / "leaving"
    line = (f"run.root={train.root}", f"data.train={train.shards}", "data.val=null", "run.name=leaving")
    train(2, "run.name=leaving", "data.val=null", "train.steps=1")
    (folder / "samples.jsonl").unlink()
    os.mkfifo(folder / "samples.jsonl")
    process = subprocess.Popen(command(2, *line, "train.steps=2"), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints/step-000000002").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        first, second = sorted(forked.ranks_of(process.pid))
        while Path(f"/proc/{first}").exists() and Path(f"/proc/{second}").exists():
            assert time.monotonic() < deadline, "one rank leaves while the other has nobody to write to"
            time.sleep(0.05)
        assert process.poll() is None and not events(folder, "end")[1:]
        written = (folder / "samples.jsonl").read_text()
        (folder / "samples.jsonl").write_text(written)  # the report waits for it
        assert json.loads(written)["step"] == 2
        assert process.wait(60) == 0 and len(events(folder, "end")) == 2
    finally:
        if process.poll() is None:
            for pid in forked.ranks_of(process.pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=600)


def test_a_rank_that_hangs_is_noticed_soon_once_steps_run(train, environment):
    folder, line = (
        train.root / "hanging",
        (f"run.root={train.root}", f"data.train={train.shards}", "train.steps=100000"),
    )
    process = subprocess.Popen(
        command(2, *line, "run.name=hanging", "data.val=null"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment | {"PRETRAIN_STEP_TIMEOUT": "10"}, text=True,
    )  # fmt: skip
    try:
        wait_for_rows(folder, 3, process)
        ranks = forked.ranks_of(process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        deadline = time.monotonic() + 120
        while Path(f"/proc/{ranks[0]}").exists():
            assert time.monotonic() < deadline, "waits for the one that hangs"
            time.sleep(0.05)
        os.kill(ranks[1], signal.SIGKILL)
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert (
            "error: another rank has not answered in time (PRETRAIN_STEP_TIMEOUT=10): it hangs, or its node is gone"
            in told
        )
    finally:
        if process.poll() is None:
            for pid in forked.ranks_of(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=60)
