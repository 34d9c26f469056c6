"""launch/slurm.sbatch on a real Slurm of two nodes: it trains, and a job near its time limit goes on exactly, later."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
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

    def submit(name: str, *overrides: str, options: Sequence[str] = ("--nodes=2",), **settings: str) -> str:
        env = {
            "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",  # the nodes' names do not resolve here
        } | settings  # fmt: skip
        options = (*options, f"--output={tmp_path / name}.out")
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


def test_a_failure_is_tried_again_while_checkpoints_advance(cluster, submit, tmp_path):
    """Each of the first two tries leaves a checkpoint; after two more without one that is all."""
    settings = {"MODULE": "tests.dist.failing_trainer", "PRETRAIN_RESTARTS": "2"}
    job = submit("failing", "+fails=[step-1,step-2,-,-]", options=["--nodes=1"], **settings)
    for restarts in (1, 2, 3):
        cluster.start_requeued_now(job, restarts)
    ended, output = cluster.wait(job), (tmp_path / "failing.out").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "3"), output
    assert output.count("queued again, try 1 of 2 without") == 2 and output.count("queued again, try 2 of 2") == 1
    assert "failed with code 1, and no checkpoint newer than step-2 in 3 tries: not queued again" in output
    assert not list(tmp_path.glob(".slurm-*"))


def test_the_time_that_a_save_takes_is_left_before_the_limit(cluster, submit, tmp_path):
    """The last one took 100 s, which of four minutes leaves nothing; here Slurm itself says no word of the limit."""
    options = ["--nodes=1", "--time=4", "--signal=B:URG@90"]
    job = submit("saving", options=options, MODULE="tests.dist.failing_trainer")
    cluster.start_requeued_now(job)
    ended, output = cluster.wait(job), (tmp_path / "saving.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    assert "time limit: saving, then queued again" in output and "DUE TO TIME LIMIT" not in output


def test_a_rank_has_the_cores_of_the_job_and_a_port_that_the_kernel_gives_to_nobody(cluster, submit, tmp_path):
    """Without --cpus-per-task, of a whole node."""
    (tmp_path / "shown.py").write_text(
        "import os, sys; print('shown', *map(os.environ.get, ('OMP_NUM_THREADS', 'SLURM_CPUS_PER_TASK', 'MASTER_PORT',"
        " 'PYTORCH_ALLOC_CONF'))) if '--check' not in sys.argv else None"
    )
    options = ["--nodes=1", "--exclusive"]
    job = submit("whole", options=options, MODULE="shown", PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="")
    cluster.wait(job)
    output = (tmp_path / "whole.out").read_text()
    _, threads, cores, port, memory, *_ = output[output.index("shown") :].split()
    assert threads == cores == "2" and 20000 <= int(port) < 30000 and memory == "expandable_segments:True", output
    assert "srun:" not in output


def test_bad_config_fails_the_job_with_one_message(cluster, submit, tmp_path):
    ended = cluster.wait(submit("bad", "train.global_batch_size=9"))
    output = (tmp_path / "bad.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), output
    assert output.count("error:") == 1 and "train.global_batch_size=9" in output and "Traceback" not in output
