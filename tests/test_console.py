"""Streams that only tell: whatever becomes of them, the work goes on; a tool whose result nobody reads ends quietly."""

import os
import subprocess
import sys
import time

import pytest

from tests import forked
from tests.forked import ROOT

WORK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pretrain import console
console.outlive("stdout", "stderr", unhurried=True)
begun = time.monotonic()
for number in range(20_000):
    print(f"line {number}", flush=True)
    print("\\u4e2d", file=sys.stderr)
with open(sys.argv[2], "w") as file:
    file.write(str(time.monotonic() - begun))
print("the last line", flush=True)
sys.stdout.drain()
"""


def work(done, redirection: str, **options) -> subprocess.Popen:
    line = ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, "-c", WORK, str(ROOT), str(done)]
    return subprocess.Popen(line, **options)


@pytest.mark.parametrize("redirection", [">/dev/full 2>&1", ">&- 2>&-", ">/dev/null 2>/dev/full"])
def test_full_and_absent_streams_end_nothing(tmp_path, redirection):
    assert work(tmp_path / "done", redirection).wait(600) == 0
    assert (tmp_path / "done").exists()


def test_a_reader_who_leaves_ends_nothing(tmp_path):
    process = work(tmp_path / "done", "2>&1", stdout=subprocess.PIPE)
    assert process.stdout.read(6) == b"line 0"
    process.stdout.close()
    assert process.wait(600) == 0 and (tmp_path / "done").exists()


def test_a_reader_who_stops_reading_stops_nobody(tmp_path):
    process = work(tmp_path / "done", "2>/dev/null", stdout=subprocess.PIPE)
    while not (tmp_path / "done").exists():  # a full pipe holds 64 KB, the lines are 200
        assert process.poll() is None
        time.sleep(0.02)
    lines = process.stdout.read().decode().splitlines()  # who reads again meets what was kept
    assert lines[:3] == ["line 0", "line 1", "line 2"] and len(lines) > 5_000
    assert process.wait(600) == 0


def test_a_character_that_a_terminal_cannot_say_ends_nothing(tmp_path):
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = work(tmp_path / "done", ">/dev/null", env=env, stderr=subprocess.PIPE)
    assert b"\\u4e2d\n" in process.communicate(timeout=600)[1] and process.returncode == 0


def test_a_tool_whose_result_nobody_reads_ends_quietly():
    line = forked.program(ROOT / "tools" / "show_model.py", "model=llama_70b")
    process = subprocess.Popen(line, env=forked.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(600) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_a_tool_that_tells_of_its_work_does_it_unread(tmp_path):
    (tmp_path / "text.txt").write_text("some words and other words\n" * 200)
    options = ("--input", tmp_path / "text.txt", "--vocab-size", "300", "--output", tmp_path / "t.model")
    line = forked.program(ROOT / "tools" / "train_tokenizer.py", *options)
    process = subprocess.Popen(line, env=forked.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(600) == 0 and (tmp_path / "t.model").stat().st_size > 0


def test_bytes_that_are_no_text_are_refused_by_place():
    line = [*forked.program(ROOT / "tools" / "show_model.py"), b"model=\xff"]
    done = subprocess.run(line, env=forked.ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr.startswith("error: argument 1 ('model=\\udcff') is not UTF-8")
