"""The guard: which losses end a run, and that a signal is noted and not obeyed at once."""

import os
import signal
import subprocess

import pytest

from pretrain.cli import STOP_SIGNALS, stops_as_ctrl_c
from pretrain.config.schema import GuardConfig
from pretrain.guard import Guard
from tests import forked

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def guard():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield Guard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("loss, norm", [(NAN, 1.0), (1.0, NAN), (INFINITE, 1.0), (1.0, INFINITE)])
def test_what_is_not_finite_is_a_problem_unless_ignored(guard, loss, norm):
    problem = guard(GuardConfig("stop")).problem(7, loss, norm)
    assert "step 7" in problem and "optim.lr" in problem
    assert guard(GuardConfig("ignore")).problem(7, loss, norm) is None
    assert guard(GuardConfig("stop")).problem(7, 1.0, 1.0) is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted(guard, number):
    watching = guard(GuardConfig("stop"))
    assert watching.received == 0
    os.kill(os.getpid(), number)
    assert watching.received == number


def test_a_second_ctrl_c_ends_the_process_at_once(environment):
    """`timeout` and some terminals send it twice: within a second that is one."""
    program = (
        "import os, signal, time; from pretrain.config.schema import GuardConfig; from pretrain.guard import Guard\n"
        "guard = Guard(GuardConfig('stop')); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.1)\n"
        "[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]\n"
        "print(guard.received, flush=True); time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    done = subprocess.run(forked.program("-c", program), env=environment, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.returncode) == (f"{signal.SIGINT:d}\n", -signal.SIGINT)


def test_under_nohup_the_end_of_the_terminal_ends_nothing(guard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watching = guard(GuardConfig("stop"))
    os.kill(os.getpid(), signal.SIGHUP)
    with stops_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGHUP)
    assert watching.received == 0 and watching.agreed_now() is None


def test_a_script_that_started_the_launcher_and_is_gone_is_noticed(guard, monkeypatch):
    script = subprocess.Popen(["sleep", "600"])
    monkeypatch.setenv("PRETRAIN_LAUNCH", f"{script.pid}-12345")
    watching = guard(GuardConfig("stop"))
    assert watching.agreed_now() is None
    script.kill()
    script.wait()
    assert watching.agreed_now() == "the launcher is gone"
