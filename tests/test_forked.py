"""A forked launch is what a launch of its own would be: its results, arguments, files, signals and end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, what = int(os.environ.get("RANK", 0)), sys.argv[1]
if what == "tell":
    print(sys.argv[2:], os.getcwd(), os.environ["COLOUR"], __name__, sys.stdin.read())
    print("to stderr", file=sys.stderr)
elif what == "python":
    print(sys.executable)
elif what == "exit":
    sys.exit("in words" if sys.argv[2] == "words" else int(sys.argv[2]))
elif what == "raise":
    raise RuntimeError("a mistake")
elif what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "one fails":
    sys.exit(3) if rank else time.sleep(600)
elif what == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
    Path(sys.argv[2], f"rank-{rank}").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("forked") / "tools" / "program.py"
    file.parent.mkdir()
    file.write_text(PROGRAM)
    return file


WAYS = [("tell", "a b", "ü"), ("exit", "0"), ("exit", "7"), ("exit", "words"), ("raise",), ("die",), ("code", "x")]
CODE = "import sys; print(sys.argv, __name__, sys.path[0]); sys.exit(4)"


@pytest.mark.parametrize("what", WAYS)
def test_it_says_and_ends_what_and_as_a_python_of_its_own_does(script, tmp_path, what):
    argv = ["-c", CODE, *what[1:]] if what[0] == "code" else [str(script), *what]
    env = forked.ENVIRONMENT | {"COLOUR": "blue"}
    options = {"env": env, "cwd": tmp_path, "input": "typed", "text": True, "capture_output": True, "timeout": 600}
    real, found = (subprocess.run(line, **options) for line in ([sys.executable, *argv], forked.program(*argv)))
    assert (found.returncode, found.stdout) == (real.returncode, real.stdout)
    assert found.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_when_one_rank_fails_the_others_end(script):
    done = subprocess.run(forked.program(script, "one fails", ranks=2), env=forked.ENVIRONMENT, timeout=300)
    assert done.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_ranks_and_none_outlives_its_launch(script, tmp_path, number):
    ranks = 2 if number == signal.SIGKILL else 1
    process = subprocess.Popen(forked.program(script, "wait", tmp_path, ranks=ranks), env=forked.ENVIRONMENT)
    while len([file for file in tmp_path.iterdir() if file.read_text()]) < ranks:
        assert process.poll() is None
        time.sleep(0.01)
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert sorted(pids) == sorted(forked.ranks_of(process.pid))
    process.send_signal(number)
    assert process.wait(timeout=600) == (5 if number == signal.SIGUSR1 else -number)
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_decided_while_importing_is_not_forked(script):
    for threads, where in (("1", str(forked.python())), ("2", sys.executable)):
        env = forked.ENVIRONMENT | {"OMP_NUM_THREADS": threads}
        line = forked.program(script, "python")
        assert subprocess.run(line, env=env, text=True, capture_output=True, timeout=600).stdout == f"{where}\n"


def test_the_server_ends_with_the_tests():
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from tests import forked; "
        "forked.start_server(['json']); print(forked.python())"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FORKED")}
    said = subprocess.run([sys.executable, "-c", program, str(forked.ROOT)], env=env, text=True, capture_output=True,
                          timeout=600).stdout  # fmt: skip
    folder = str(Path(said.strip()).parent)
    assert folder.startswith("/") and not Path(folder).exists()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        assert folder.encode() not in entry.read_bytes()
