"""The journal is exact whatever crashed, the console stays readable, and W&B gets each step once and never the way."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pretrain.config.schema import LogConfig
from pretrain.report import log as log_module
from pretrain.report import wandb_run
from pretrain.report.log import Log
from tests.forked import ROOT
from tests.journals import events, journal, wandb_history, wandb_records

KEY = "d1" * 20  # shaped like an API key


def open_log(run_dir, start_step=0, wandb="disabled", console=False, is_main=True, total_steps=100, config=None):
    settings = LogConfig(wandb=wandb, project="tests", console=console, sample_prompt="", sample_tokens=0)
    return Log(settings, run_dir, total_steps, config or {"seed": 1}, start_step, is_main)


def row(step, **more):
    return {"step": step, "tokens": step * 64, "loss": 1 / step, "tokens_per_second": 2900.4, "mfu": 0.623} | more


def test_rows_keep_full_precision_and_null_stands_for_what_is_not_finite(tmp_path):
    log = open_log(tmp_path)
    written = row(1, loss=0.1 + 0.2, grad_norm=math.inf, lr=np.float32(1e-3), val_loss=np.float64("nan"))
    log.row(written)
    log.event("skip", step=1, loss=math.nan, path=Path("a/b"), nested={"x": [math.inf, 1]})
    log.close()
    (found,) = journal(tmp_path)
    assert list(found) == list(written)
    assert found["loss"] == 0.1 + 0.2 and found["lr"] == float(np.float32(1e-3))
    assert found["grad_norm"] is None and found["val_loss"] is None
    (event,) = events(tmp_path, "skip")
    assert event["loss"] is None and event["path"] == "a/b" and event["nested"] == {"x": [None, 1]} and event["time"]


def test_a_row_is_readable_as_soon_as_it_is_logged(tmp_path):
    log = open_log(tmp_path)
    log.row(row(1))
    log.event("start", ranks=2)
    assert journal(tmp_path) == [row(1)] and events(tmp_path, "start")
    log.close()


def test_opening_drops_a_torn_line_and_cuts_back_to_the_start_step(tmp_path):
    whole = b"".join(json.dumps(row(step)).encode() + b"\n" for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 9, "lo')
    (tmp_path / "events.jsonl").write_bytes(b'{"time": "t", "kind": "start"}\n{"time": "t2", "ki')
    log = open_log(tmp_path, start_step=6)
    log.row(row(7, loss=7.0))
    log.close()
    assert [(r["step"], r["loss"]) for r in journal(tmp_path)] == [(s, 1 / s) for s in range(1, 7)] + [(7, 7.0)]
    assert [event["time"] for event in events(tmp_path, "start")] == ["t"]
    (event,) = events(tmp_path, "journal")
    assert (event["step"], event["rows_cut"], event["rows_damaged"]) == (6, 2, 1) and "rows_missing" not in event
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_or_missing_row_is_told_and_an_intact_journal_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(row(step)).encode() + b"\n" for step in range(1, 6)))
    inode = path.stat().st_ino
    open_log(tmp_path, start_step=5).close()
    assert path.stat().st_ino == inode and not events(tmp_path, "journal")
    path.write_bytes(path.read_bytes().replace(b'{"step": 3', b"\0\0\0\0\0\0\0\0\0\0"))
    open_log(tmp_path, start_step=5).close()
    assert [r["step"] for r in journal(tmp_path)] == [1, 2, 4, 5]
    (event,) = events(tmp_path, "journal")
    assert event["rows_damaged"] == 1 and event["rows_missing"] == 1


def test_going_back_a_step_within_a_run_is_our_own_mistake(tmp_path):
    log = open_log(tmp_path, start_step=0)
    log.row(row(1))
    with pytest.raises(AssertionError):
        log.row(row(1))
    log.close()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from pretrain.config.schema import LogConfig
from pretrain.report.log import Log
log = Log(LogConfig("disabled", "p", False, "", 0), Path(sys.argv[1]), 10**9, {}, int(sys.argv[3]), True)
for step in range(int(sys.argv[3]) + 1, 10**9):
    log.row({"step": step, "loss": 1 / step, "text": "x" * 5000})
"""


def test_killed_at_any_moment_and_reopened_there_is_one_row_a_step(tmp_path):
    start_step = 0
    for seconds in (0.05, 0.11, 0.17):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, ROOT, str(start_step)])
        while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_bytes()) < 10**6:
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        start_step = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") * 2 // 3
    log = open_log(tmp_path, start_step=start_step)
    log.row(row(start_step + 1))
    log.close()
    assert [r["step"] for r in journal(tmp_path)] == list(range(1, start_step + 2))


def test_a_rank_that_is_not_the_main_one_writes_and_prints_nothing(tmp_path, capfd):
    log = open_log(tmp_path / "run", is_main=False, console=True, wandb="offline")
    log.row(row(1))
    log.event("start")
    log.say("hello")
    log.sync()
    log.close()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_there_are_a_few_plain_lines(tmp_path, capsys):
    log = open_log(tmp_path, console=True, total_steps=50)
    for step in range(1, 51):
        log.row(row(step, **({"val_loss": 2.25, "val_bits_per_byte": 1.125} if step == 20 else {})))
    log.event("saved", step=50, reason="last\nstep")
    log.close()
    out, err = capsys.readouterr()
    assert out == "step 20: validation loss 2.2500, bits per byte 1.1250\nsaved: step 50, reason last step\n"
    assert len(err.splitlines()) == 2 and "\r" not in err  # fifty quick steps: the first and the last
    assert f"{tmp_path.name} 100% step 50/50: loss 0.0200, 2,900 tokens/s, MFU 62.3%" in err


def test_an_evaluation_is_told_set_by_set(tmp_path, capsys):
    log = open_log(tmp_path, console=True)
    log.row(row(10, val_loss=2.25, val_bits_per_byte=1.125))
    log.row(row(20, **{"val_my_news/loss": 2.25, "val_my_news/bits_per_byte": 1.125, "val_web/loss": 2}))
    log.row(row(30, **{"val_news/loss": None, "val_web/macro_f1": 0.5}))
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 10: validation loss 2.2500, bits per byte 1.1250",
        "step 20: validation my_news loss 2.2500, bits per byte 1.1250; web loss 2.0000",
        "step 30: validation web macro f1 0.5000",
    ]


def test_plain_lines_come_with_time_and_tell_the_time_left(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    log = open_log(tmp_path, console=True, total_steps=1000)
    for step in range(1, 21):
        now[0] += 4
        log.row(row(step, mfu=None, loss=None))
    log.close()
    said, plain = capsys.readouterr()
    lines = plain.splitlines()
    assert said == f"{tmp_path.name}: the 994 steps that are left take about 1:06:16 on this machine\n"
    assert [line.split()[3] for line in lines] == [f"{step}/1,000:" for step in (1, 4, 7, 10, 13, 16, 19)]
    assert lines[-1].endswith("1% step 19/1,000: 2,900 tokens/s, 1:05:24 left")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_one_bar_and_lines_above_it(tmp_path, capsys, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log = open_log(tmp_path, console=True, start_step=2, total_steps=10)
    for step in range(3, 11):
        log.row(row(step))
    log.say("above")
    log.doing("drawing the report")
    log.close()
    assert "10/10 [" in (last := screen.getvalue().split("\r")[-1]) and last.rstrip().endswith("drawing the report]")
    assert capsys.readouterr().out.startswith("journal: rows of step 2: 2 before it missing\nabove")
    assert "10/10 [" in screen.getvalue() and "loss 0.1000, 2,900 tokens/s, MFU 62.3%" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_with_the_console_off_only_what_is_said_is_printed(tmp_path, capfd):
    log = open_log(tmp_path)
    log.row(row(1, val_loss=1.0))
    log.event("start")
    log.say("result")
    log.close()
    assert capfd.readouterr() == ("result\n", "")


# Weights & Biases, the real client.


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """No account of whoever runs the tests, and no way out of this machine."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    return tmp_path


def files_with(text, folder):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_wandb_offline_resumed_keeps_its_id_and_sends_each_step_once(wandb_home, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = wandb_home / "runs" / "small"
    log = open_log(run_dir, wandb="offline", config={"optim": {"lr": 0.25}})
    for step in range(1, 8):
        log.row(row(step, grad_norm=math.nan if step == 2 else 1.0, batch_hash="ab", **{"val_a.b/loss": 2.5}))
    log.close(val_loss=1.5)
    time.sleep(1.1)  # wandb names its folders by the second
    log = open_log(run_dir, start_step=4, wandb="offline")  # back to a checkpoint, past what was sent
    for step in range(5, 11):
        log.row(row(step))
    log.close()

    first, second = wandb_records(run_dir)
    assert [item["step"] for item in wandb_history(first)] == [1, 2, 3, 4, 5, 6, 7]
    assert [item["step"] for item in wandb_history(second)] == [8, 9, 10]
    assert [item["_step"] for item in wandb_history(second)] == [8, 9, 10]  # else a sync would drop them
    assert wandb_history(first)[2]["loss"] == 1 / 3 and wandb_history(first)[2]["tokens"] == 192
    assert wandb_history(first)[2]["val_a.b/loss"] == 2.5
    runs = [record["run"] for record in first + second if record["type"] == "run"]
    assert len(runs) == 2 and runs[0]["run_id"] == runs[1]["run_id"] and runs[0]["project"] == "tests"
    assert runs[0]["config"]["update"]["optim"] == {"lr": 0.25} and runs[0]["display_name"] == "small"
    assert {r["metric"].get("name") or r["metric"].get("glob_name") for r in first if r["type"] == "metric"} == {
        "step", "tokens", "*",
    }  # fmt: skip
    summaries = [record["summary"]["update"] for record in first if record["type"] == "summary"]
    assert first[-1]["type"] == "exit" and any(summary.get("val_loss") == 1.5 for summary in summaries)
    assert not {"git", "requirements", "stats"} & {record["type"] for record in first}
    assert not files_with(KEY, wandb_home) and not events(run_dir, "wandb")
    assert capfd.readouterr() == ("", "")  # wandb itself is quiet


def test_rows_of_a_time_without_wandb_are_sent_when_it_is_there(wandb_home):
    run_dir = wandb_home / "run"
    log = open_log(run_dir)
    for step in range(1, 6):
        log.row(row(step))
    log.close()
    assert not (run_dir / "wandb").exists()
    log = open_log(run_dir, start_step=4, wandb="offline")
    log.row(row(5))
    log.close()
    (start,) = wandb_records(run_dir)
    assert [item["step"] for item in wandb_history(start)] == [1, 2, 3, 4, 5]


def test_rows_that_a_killed_start_never_wrote_are_sent_by_the_next(wandb_home):
    """The mark is ahead of the file: what counts as handed over was still on its way."""
    run_dir = wandb_home / "run"
    log = open_log(run_dir, wandb="offline")
    for step in range(1, 2001):  # more than a block of the file
        log.row(row(step))
    log.close()
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 600
    while list(wandb_run._steps_in(file)) != list(range(1, 2001)):  # W&B's process writes on for a moment
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert file.stat().st_size > 3 * 32768
    state = json.loads((run_dir / "wandb" / "state.json").read_text())
    assert state["sent_step"] == 2000 and state["closed"]
    (run_dir / "wandb" / "state.json").write_bytes(wandb_run._state_bytes(state["id"], 2000))  # as before the close
    os.truncate(file, file.stat().st_size // 2)
    kept = list(wandb_run._steps_in(file))
    assert kept == list(range(1, len(kept) + 1)) and 500 < len(kept) < 1500
    time.sleep(1.1)  # wandb names its folders by the second
    log = open_log(run_dir, start_step=1990, wandb="offline")
    for step in range(1991, 2011):
        log.row(row(step))
    log.close()
    (last,) = (path for path in run_dir.glob("wandb/offline-run-*/*.wandb") if path != file)
    assert list(wandb_run._steps_in(last)) == list(range(len(kept) + 1, 2011))


def test_wandb_online_and_unreachable_goes_on_offline(wandb_home, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_SECONDS", 2)
    began = time.monotonic()
    log = open_log(wandb_home / "run", wandb="online")
    log.row(row(1))
    log.close()
    assert time.monotonic() - began < 60
    (event,) = events(wandb_home / "run", "wandb")
    assert "online failed" in event["problem"] and event["instead"] == "offline"
    (start,) = wandb_records(wandb_home / "run")
    assert [item["step"] for item in wandb_history(start)] == [1]
    assert not files_with(KEY, wandb_home)
    assert capfd.readouterr() == ("", "")


class FakeWandb(BaseHTTPRequestHandler):
    """As much of the W&B server as a run needs; `server.steps` is what arrived, `server.stalled` stops all answers."""

    protocol_version = "HTTP/1.1"
    project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "us"}}
    bucket = {"id": "b", "name": "x", "displayName": "x", "config": "{}", "summaryMetrics": "{}", "project": project}
    answers = {
        "Viewer": {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}},
        "RunResumeStatus": {"model": {**project, "bucket": None}},
        "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
    }

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if self.server.stalled:
            time.sleep(600)
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server.steps += [json.loads(line)["step"] for line in lines]
        name = body.get("query", "").replace("(", " ").split()[1:2]
        answer = json.dumps({"data": self.answers.get(name[0], {})} if name else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("stalled", [False, True])
def test_wandb_online_sends_every_step_or_says_that_it_could_not(wandb_home, monkeypatch, capfd, stalled):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeWandb)
    server.daemon_threads, server.stalled, server.steps = True, False, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if stalled:
        monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT_SECONDS", 2)
    log = open_log(wandb_home / "run", wandb="online")
    server.stalled = stalled
    began = time.monotonic()
    for step in range(1, 101):
        log.row(row(step))
    assert time.monotonic() - began < 300, "the server stalls for ten minutes"
    log.close()
    assert time.monotonic() - began < 300
    assert server.steps == ([] if stalled else list(range(1, 101)))
    problems = [event["problem"] for event in events(wandb_home / "run", "wandb")]
    assert problems == (["finish failed: Timed out finishing run."] if stalled else [])
    assert len(journal(wandb_home / "run")) == 100
    assert not files_with(KEY, wandb_home) and capfd.readouterr() == ("", "")
    server.shutdown()


def test_wandb_online_without_a_key_does_not_ask_for_one(wandb_home):
    log = open_log(wandb_home / "run", wandb="online")
    log.row(row(1))
    log.close()
    (event,) = events(wandb_home / "run", "wandb")
    assert "set WANDB_API_KEY" in event["problem"] and event["instead"] == "offline"
    assert [item["step"] for item in wandb_history(wandb_records(wandb_home / "run")[0])] == [1]


def test_wandb_in_trouble_during_a_run_is_told_once_and_training_goes_on(wandb_home):
    run_dir = wandb_home / "run"
    log = open_log(run_dir, wandb="offline")
    log.row(row(1))
    log._wandb._run.finish()  # from here on its log() raises
    for step in (2, 3, 4):
        log.row(row(step))
    log.close()
    assert [r["step"] for r in journal(run_dir)] == [1, 2, 3, 4]
    (event,) = events(run_dir, "wandb")
    assert "log failed" in event["problem"]


def test_wandb_that_does_not_start_at_all_is_told_and_training_goes_on(wandb_home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` raises
    log = open_log(wandb_home / "run", wandb="offline")
    log.row(row(1))
    log.close()
    assert journal(wandb_home / "run") == [row(1)]
    assert events(wandb_home / "run", "wandb")[0]["instead"] == "no W&B"


def test_a_damaged_wandb_state_starts_a_new_run_and_says_so(wandb_home):
    run_dir = wandb_home / "run"
    (run_dir / "wandb").mkdir(parents=True)
    (run_dir / "wandb" / "state.json").write_text("{")
    log = open_log(run_dir, wandb="offline")
    log.row(row(1))
    log.close()
    assert "is damaged" in events(run_dir, "wandb")[0]["problem"]
    state = json.loads((run_dir / "wandb" / "state.json").read_text())
    assert state["sent_step"] == 1 and state["id"]
