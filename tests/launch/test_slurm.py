"""launch/slurm.sbatch on a real Slurm of two nodes: it trains, and a job near its time limit goes on exactly, later."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.forked import ROOT
from tests.journals import rows_of

pytestmark = pytest.mark.slurm
STEPS = 60
TINY = (
    "model=llama_tiny", f"train.steps={STEPS}", "train.global_batch_size=8", "train.micro_batch_size=4",
    "train.seq_len=128", "train.save_every=0", "train.eval_every=0", "log=none", "deepspeed=zero2",
)  # fmt: skip


@pytest.fixture
def submit(cluster, shards, tmp_path):
    """submit(NAME, OVERRIDES...) -> job: slurm.sbatch on both nodes, its output in tmp_path/NAME.out."""

    def submit(name: str, *overrides: str) -> str:
        env = {
            "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",  # the nodes' names do not resolve here
        }  # fmt: skip
        options = ("--nodes=2", f"--output={tmp_path / name}.out")
        arguments = (*TINY, f"run.root={tmp_path}", f"run.name={name}", f"data.train={shards}", *overrides)
        return cluster.submit(*options, "launch/slurm.sbatch", *arguments, cwd=ROOT, env=env)

    return submit


def journal(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_job_trains_and_continues_after_its_time_limit(cluster, submit, tmp_path, shards):
    """Two nodes of one rank. USR1, as Slurm sends it before the limit: saved, queued again, and then bit for bit
    the losses and batches of two ranks that were left alone."""
    alone = (f"run.root={tmp_path}", "run.name=undisturbed", f"data.train={shards}")
    line = forked.program("-m", "pretrain.train", *TINY, *alone, ranks=2)
    subprocess.run(line, env=forked.ENVIRONMENT, check=True, capture_output=True, timeout=600)
    job = submit("requeued")
    deadline = time.monotonic() + 600
    while len(journal(tmp_path / "requeued")) < 5:
        assert time.monotonic() < deadline and cluster.show(job)["JobState"] in ("PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.start_requeued_now(job)
    after_save = len(journal(tmp_path / "requeued"))
    assert 5 <= after_save < STEPS
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "requeued.out").read_text()
    keys = ("step", "loss", "grad_norm", "lr", "batch_hash")
    expected, found = (
        [{key: row[key] for key in keys} for row in journal(tmp_path / name)] for name in ("undisturbed", "requeued")
    )
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert found == expected
    events = rows_of(tmp_path / "requeued" / "events.jsonl")
    resumed = [event for event in events if event["kind"] == "resume"]
    assert [(event["step"], event["ranks"]) for event in resumed] == [(after_save, 2)]


def test_a_run_that_was_stopped_is_not_queued_again(cluster, submit, tmp_path):
    """Whoever stops a run means it; srun passes its exit code on."""
    job = submit("stopped", "train.steps=100000")
    deadline = time.monotonic() + 600
    while len(journal(tmp_path / "stopped")) < 3:
        assert time.monotonic() < deadline and cluster.show(job)["JobState"] in ("PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.run("scancel", "--signal=TERM", f"{job}.0")
    ended = cluster.wait(job)
    output = (tmp_path / "stopped.out").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), output
    assert "srun: error" not in output
    (stop,) = [row for row in rows_of(tmp_path / "stopped" / "events.jsonl") if row["kind"] == "stopped"]
    assert stop["reason"] == "SIGTERM" and stop["step"] == len(journal(tmp_path / "stopped"))


def test_bad_config_fails_the_job_with_one_message(cluster, submit, tmp_path):
    ended = cluster.wait(submit("bad", "train.global_batch_size=9"))
    output = (tmp_path / "bad.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), output
    assert output.count("error:") == 1 and "train.global_batch_size=9" in output and "Traceback" not in output
