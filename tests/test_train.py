"""The trainer as a user runs it, on real ranks: killed and resumed, moved between stages and ranks, and misused."""

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import LENGTH, TINY, command
from tests.forked import ROOT
from tests.journals import events, exact, journal


def test_a_run_leaves_everything_it_promises(undisturbed):
    rows = journal(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 25))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "step_seconds", "batch_hash"}
    assert all(keys <= set(row) for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [8, 16, 24]
    assert rows[-1]["tokens"] == 24 * 8 * 32
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and rows[-1]["val_loss"] < rows[0]["loss"]
    assert 0 < rows[-1]["mfu"] < 1.2
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step-000000015", "step-000000020", "step-000000024"]
    for name in ("config.yaml", "tokenizer.model", "report.html", "samples.jsonl"):
        assert (undisturbed / name).stat().st_size > 0
    assert [event["kind"] for event in events(undisturbed)] == ["start", "source", *["saved"] * 5, "end"]
    assert events(undisturbed)[0]["interface"] == "lo", "as the environment of the tests says"


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen) -> None:
    file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
        time.sleep(0.005)


def disturb(train, environment, name: str, at_row: int, number: signal.Signals, *overrides: str, ranks: int = 2) -> int:
    """Start the run, send all workers a signal once the journal has `at_row` rows; the launcher's exit code."""
    where = (f"run.root={train.root}", f"run.name={name}", f"data.train={train.shards}", f"data.val={train.shards}")
    line = command(ranks, *where, *LENGTH, *overrides)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_rows(train.root / name, at_row, process)
        for worker in forked.ranks_of(process.pid):
            os.kill(worker, number)
        return process.wait(timeout=600)
    finally:
        if process.poll() is None:
            for worker in forked.ranks_of(process.pid):
                os.kill(worker, signal.SIGKILL)
            process.kill()
            process.wait()


def test_killed_twice_at_random_steps_a_run_is_bitwise_the_undisturbed_one(train, environment, undisturbed):
    seed = time.time_ns()
    rng = random.Random(seed)
    for at_row in sorted(rng.sample(range(1, 23), 2)):
        assert disturb(train, environment, "killed", at_row, signal.SIGKILL, "deepspeed=zero1") != 0
    train(2, "run.name=killed", "deepspeed=zero1", "train.deterministic=true", *LENGTH)  # on a CPU the same bits
    killed = train.root / "killed"
    assert exact(journal(killed)) == exact(journal(undisturbed)), f"seed {seed}"


def test_a_stop_signal_saves_and_the_run_goes_on_bitwise(train, environment, undisturbed):
    assert disturb(train, environment, "stopped", 7, signal.SIGUSR1, "deepspeed=zero1") == 1  # torchrun
    stopped = train.root / "stopped"
    (stop,) = events(stopped, "stopped")
    assert stop["reason"] == "SIGUSR1" and 7 <= stop["step"] < 24
    assert (stopped / "checkpoints" / f"step-{stop['step']:09d}").is_dir()
    train(2, "run.name=stopped", "deepspeed=zero1", *LENGTH)
    found, reference = exact(journal(stopped)), exact(journal(undisturbed))
    at = stop["step"] - 1  # a run that must stop does not evaluate first
    assert found[:at] == reference[:at] and found[at + 1 :] == reference[at + 1 :]
    assert found[at][:6] == reference[at][:6]
    assert [event["step"] for event in events(stopped, "resume")] == [stop["step"]]


def test_any_stage_at_any_number_of_ranks_goes_on_from_any_checkpoint(train, undisturbed):
    """ZeRO-1 on 2 ranks -> ZeRO-3 on 1 -> ZeRO-2 on 2, in fp32, against the undisturbed run."""
    for ranks, stage, steps in ((2, 1, 8), (1, 3, 16), (2, 2, 24)):
        done = train(ranks, "run.name=moved", f"deepspeed=zero{stage}", f"train.steps={steps}", *LENGTH[1:])
        assert ranks == 2 and stage == 1 or "goes on with changed settings" in done.stdout
    moved, reference = journal(train.root / "moved"), journal(undisturbed)
    assert [row["batch_hash"] for row in moved] == [row["batch_hash"] for row in reference]
    assert [row["loss"] for row in moved] == pytest.approx([row["loss"] for row in reference], rel=1e-4)
    assert moved[-1]["val_loss"] == pytest.approx(reference[-1]["val_loss"], rel=1e-4)


def test_one_rank_sees_the_same_batches_and_validation_loss(train, undisturbed):
    train(1, "run.name=single", "deepspeed=zero0", "train.steps=8", *LENGTH[1:])
    single, reference = journal(train.root / "single"), journal(undisturbed)[:8]
    assert [row["batch_hash"] for row in single] == [row["batch_hash"] for row in reference]
    assert [row["loss"] for row in single] == pytest.approx([row["loss"] for row in reference], rel=1e-5)
    for key in ("val_loss", "val_bits_per_byte"):
        assert single[-1][key] == pytest.approx(reference[-1][key], rel=1e-6)


def test_a_finished_run_says_so_and_is_left_alone(train, undisturbed):
    before = journal(undisturbed)
    done = train(2, "run.name=undisturbed", "deepspeed=zero1", *LENGTH)
    assert "raise train.steps" in done.stdout and journal(undisturbed) == before


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_and_activation_checkpointing_train_and_resume_bitwise(train, undisturbed, stage, tmp_path):
    """And compiled blocks, at stage 3, out of a folder of this user's own."""
    kind = {1: "true", 3: "ffn train.compile=blocks"}[stage]
    overrides = ("train.precision=bf16", *f"train.activation_checkpointing={kind}".split(), f"deepspeed=zero{stage}")
    done = train(2, f"run.name=bf16-{stage}", *overrides, "train.steps=8", HOME=str(tmp_path))
    said = done.stdout.splitlines()
    assert not [line for line in said if line.startswith(("MA ", "CPU Virtual", "begin "))], "DeepSpeed is quiet"
    bf16, reference = journal(train.root / f"bf16-{stage}"), journal(undisturbed)[:8]
    assert [row["loss"] for row in bf16] == pytest.approx([row["loss"] for row in reference], rel=0.02)
    assert [row["batch_hash"] for row in bf16] == [row["batch_hash"] for row in reference]
    for steps in (3, 8):
        again = (f"run.name=bf16-{stage}-resumed", f"train.steps={steps}", "train.eval_every=8")
        train(2, *again, *overrides, HOME=str(tmp_path))
    resumed = exact(journal(train.root / f"bf16-{stage}-resumed"))
    assert [row[:6] for row in resumed] == [row[:6] for row in exact(bf16)]
    chosen = "blocks" if stage == 3 else "none"
    assert events(train.root / f"bf16-{stage}")[0]["compile"] == chosen
    assert len(events(train.root / f"bf16-{stage}", "compiled")) == (chosen == "blocks")
    if chosen == "blocks":
        assert "compiling the blocks of the model" in done.stdout
        assert any((tmp_path / ".cache/pretrain/inductor").rglob("*.so")), "what was compiled"


def test_a_rank_alone_keeps_the_threads_that_it_began_with(train):
    line = ("run.name=threads", "train.eval_every=8")
    train(1, *line, "train.steps=2", OMP_NUM_THREADS="")
    journal_of_events = train.root / "threads" / "events.jsonl"
    begun = events(train.root / "threads", "start")[0]
    assert 1 <= begun["threads"] <= len(os.sched_getaffinity(0))
    text = journal_of_events.read_text()
    journal_of_events.write_text(text.replace(f'"threads": {begun["threads"]}', '"threads": 1'))
    done = train(1, *line, "train.steps=3", OMP_NUM_THREADS="")
    assert events(train.root / "threads", "resume")[0]["threads"] == 1 and "1 x cpu of 1 thread," in done.stdout
    several = len(os.sched_getaffinity(0)) > 1
    assert ("note: this run computes with 1 of" in done.stdout) == several


WITHOUT_A_COMPILER = """
import torch._inductor.config
from pretrain import entry, train
torch._inductor.config.cpp.cxx = (None, "/bin/false")  # what CXX says, read when it was imported
entry.main("pretrain", train.make_plan)
"""


def test_blocks_that_cannot_be_compiled_stay_plain_and_one_event_says_why(train, environment, undisturbed, tmp_path):
    where = (f"run.root={train.root}", f"data.train={train.shards}", f"data.val={train.shards}", "run.name=uncompiled")
    line = command(2, *where, "deepspeed=zero1", "train.compile=blocks", "train.steps=3", "train.eval_every=8")
    at = line.index("pretrain.train")
    line[at - 1 : at + 1] = "-c", WITHOUT_A_COMPILER
    env = environment | {"HOME": str(tmp_path)}
    done = subprocess.run(line, env=env, check=True, capture_output=True, text=True, timeout=600)
    (told,) = events(train.root / "uncompiled", "not_compiled")
    assert "/bin/false" in told["problem"] and "install g++" in told["problem"] and "\n" not in told["problem"]
    assert done.stdout.count("not_compiled: the blocks of the model: ") == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert exact(journal(train.root / "uncompiled"))[:2] == exact(journal(undisturbed))[:2]


def test_a_loss_that_is_not_finite_ends_the_run_in_words_and_harms_no_checkpoint(train):
    wild = ("optim.lr=1e30", "optim.grad_clip=0", "train.steps=9", "train.save_every=1")
    done = train(1, "run.name=nan", *wild, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: step" in done.stderr and "optim.lr" in done.stderr
    saved = sorted((train.root / "nan" / "checkpoints").glob("step-*"))
    assert saved and len(journal(train.root / "nan")) <= int(saved[-1].name[5:])


def snapshot(root: Path) -> dict:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


MISTAKES = {
    "unknown key": (["train.stepz=3"], ["train.stepz", "train.steps"]),
    "unknown key with +": (["+modl.layers=3"], ["modl", "unknown key"]),
    "wrong type": (["train.steps=abc"], ["train.steps", "abc"]),
    "batch does not divide": (["train.global_batch_size=9"], ["train.global_batch_size=9", "8 or 10"]),
    "missing data": (["data.train=/nowhere"], ["/nowhere"]),
    "no data": (["data.train=null"], ["data.train", "tools/write_shards.py"]),
    "sequence too long": (["train.seq_len=2048"], ["train.seq_len=2048", "model.max_positions=1024"]),
    "fewer samples than a batch": (["train.seq_len=1024", "train.global_batch_size=4096"], ["4096", "samples"]),
    "unknown DeepSpeed setting": (["++deepspeed.extra={offlaod: 1}"], ["deepspeed.extra.offlaod"]),
    "another config": (["run.name=undisturbed", "model.layers=3"], ["undisturbed", "model.layers: 2 -> 3", "run.name"]),
    "never resume": (["run.name=undisturbed", "resume=never"], ["undisturbed", "resume=auto"]),
    "compiled blocks where not all weights learn": (
        ["train.compile=blocks", "deepspeed=zero3", "model.lora_rank=2"],
        ["train.compile=blocks", "deepspeed=zero2"],
    ),
    "vocabulary too small": (["model.vocab_size=100"], ["model.vocab_size=100", "512"]),
    "a folder that is a file": (["run.root=/dev/null"], ["run.root=/dev/null", "is no folder"]),
    "a folder on a disk that is read only": (["run.root=/proc/runs"], ["/proc"]),
    "a prompt that is too long": ([f"log.sample_prompt={'word ' * 1100}"], ["log.sample_prompt", "1024 positions"]),
    "a phase that does not divide": (
        ["train.phases=[{from_step: 9, global_batch_size: 7}]"],
        ["train.phases[0]", "global_batch_size=7", "6 or 8"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(train, undisturbed, mistake):
    overrides, words = MISTAKES[mistake]
    before = snapshot(train.root)
    done = train(1, "run.name=mistaken", *overrides, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr
    assert snapshot(train.root) == before, "nothing is written or changed"


def test_a_mistake_has_one_voice_on_two_ranks(train):
    done = train(2, "run.name=mistaken", "train.stepz=3", check=False)
    assert done.stderr.count("error: unknown key train.stepz") == 1
    assert done.returncode != 0 and not (train.root / "mistaken").exists()


IN_FP16 = """
from deepspeed.accelerator import get_accelerator
from pretrain import entry, hardware, train
get_accelerator().is_fp16_supported = hardware._has_fp16 = lambda: True  # slowly: torch computes it on any processor
make = entry.deepspeed_config
def with_a_high_scale(*arguments):
    settings = make(*arguments)
    settings["fp16"]["initial_scale_power"] = 26
    return settings
entry.deepspeed_config = with_a_high_scale
entry.main("pretrain", train.make_plan)
"""


def test_fp16_skips_what_overflows_without_moving_the_schedule_and_resumes_bitwise(train, environment, undisturbed):
    def run(name, steps):
        data = f"data.train={train.shards}", "data.val=null", f"run.root={train.root}", "train.precision=fp16"
        line = command(2, *data, f"run.name={name}", "train.eval_every=0", "train.save_every=2", f"train.steps={steps}")
        where = line.index("pretrain.train")
        line[where - 1 : where + 1] = "-c", IN_FP16
        subprocess.run(line, env=environment, check=True, capture_output=True, timeout=600)
        return journal(train.root / name)

    whole, reference = run("fp16", 24), journal(undisturbed)
    skipped = [row["skipped_steps"] for row in whole]
    assert skipped[:3] == [1, 2, 3] and 3 <= skipped[-1] < 20
    is_skipped = [now > before for before, now in itertools.pairwise([0, *skipped])]
    assert [row["grad_norm"] is None for row in whole] == is_skipped
    assert whole[0]["loss_scale"] == 2**25 and whole[-1]["loss_scale"] == 2.0 ** (26 - skipped[-1])
    assert [row["lr"] for row in whole] == [reference[step - before]["lr"]
                                            for step, before in enumerate([0, *skipped[:-1]])]  # fmt: skip
    assert [row["batch_hash"] for row in whole] == [row["batch_hash"] for row in reference]
    run("fp16-resumed", 4)
    assert exact(run("fp16-resumed", 24)) == exact(whole)


OF_ANOTHER_NODE = """
import os, sys, torch
from pretrain import entry, hardware, train
what, is_other = {what!r}, os.environ["RANK"] == "1"
if what == "optim":
    sys.argv += ["optim.lr=0.5"] if is_other else []
elif what == "precision":
    hardware._cpuinfo = lambda: "" if is_other else "avx512_bf16"
elif is_other:
    os.environ["LOCAL_RANK"] = "4"
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 4
entry.main("pretrain", train.make_plan)
"""
OTHERWISE = "error: rank 1 on .* has another configuration than rank 0 on .*: "


@pytest.mark.parametrize("what, said", [
    ("optim", f"{OTHERWISE}optim.lr: 0.003 there, 0.5 here."),
    ("precision", f"{OTHERWISE}train.precision: bf16 there, fp32 here."),
    ("device", "error: LOCAL_RANK=4, and this rank sees 4 GPUs: start at most 4 ranks on a node"),
])  # fmt: skip
def test_what_only_one_rank_has_is_told(train, environment, what, said):
    """Another configuration, another meaning of it, or no device, which it says itself: they are not together yet."""
    settings = ("data.val=null", "train.precision=auto")
    line = command(2, f"run.root={train.root}", "run.name=mistaken", f"data.train={train.shards}", *settings)
    where = line.index("pretrain.train")
    line[where - 1 : where + 1] = "-c", OF_ANOTHER_NODE.format(what=what)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert done.returncode != 0 and not (train.root / "mistaken").exists()


def test_data_and_tokenizer_mistakes(train, tmp_path, environment):
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other.model"
    tool = ROOT / "tools" / "train_tokenizer.py"
    text = tmp_path / "text.txt"
    text.write_text("some words and other words\n" * 200)
    line = forked.program(tool, "--input", str(text), "--vocab-size", "300", "--output", other)
    subprocess.run(line, env=environment, check=True, capture_output=True)
    occupied = train.root / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("do not touch")
    for overrides, data, word in (
        (["run.name=mistaken"], empty, str(empty)),
        (["run.name=mistaken", f"data.tokenizer={other}"], train.shards, "another tokenizer"),
        (["run.name=occupied"], train.shards, "not a run"),
    ):
        done = train(1, *overrides, data=data, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and word in done.stderr, done.stderr
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]


def test_check_and_cfg_and_help_train_nothing(train):
    checked = train(1, "run.name=checked", "schedule.warmup_steps=30", *LENGTH, "--check")
    assert checked.stderr == "" and "begins, " in checked.stdout and "to step 24 of 8 samples" in checked.stdout
    assert "note: schedule.warmup_steps=30 is more than train.steps=24" in checked.stdout
    assert train(1, "run.name=checked", "train.steps=0", "--check", check=False).returncode == 2
    shown = train(1, "run.name=checked", "--cfg", "job").stdout
    assert "global_batch_size: 8" in shown and "precision: fp32" in shown
    assert "torchrun --nproc-per-node 2 -m pretrain.train" in train(1, "--help").stdout
    assert not (train.root / "checked").exists()


def test_training_goes_on_when_nobody_reads_what_it_says(train, environment):
    where = (f"run.root={train.root}", f"data.train={train.shards}", "run.name=unread", "log.console=true")
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command(1, *where, *LENGTH[:2]), env=environment, **both)
    process.stdout.read(20)
    process.stdout.close()
    assert process.wait(600) == 0
    assert len(journal(train.root / "unread")) == 24 and events(train.root / "unread", "end")


def test_what_fails_after_training_takes_nothing_back(train, undisturbed):
    (train.root / "pageless" / "report.html").mkdir(parents=True)
    (train.root / "pageless" / "samples.jsonl").mkdir()
    (train.root / "pageless" / "config.yaml").write_text((undisturbed / "config.yaml").read_text())
    done = train(1, "run.name=pageless", "deepspeed=zero1", "train.steps=2", "train.eval_every=0")
    failed = events(train.root / "pageless", "not_written")
    assert [event["what"] for event in failed] == ["the sample text", "the report"], done.stdout
    (end,) = events(train.root / "pageless", "end")
    assert end["step"] == 2 and (train.root / "pageless" / "checkpoints" / "step-000000002").is_dir()


def test_a_jump_of_the_learning_rate_is_said(train):
    cosine = ("run.name=longer", "schedule=cosine", "schedule.warmup_steps=1", "train.eval_every=0", "optim.lr=1e-3")
    train(1, *cosine, "train.steps=6")
    said = train(1, *cosine, "train.steps=12", "--check").stdout
    assert "the learning rate goes from 1.00e-04 at step 6 to 4.86e-04 at step 7 (schedule=wsd keeps it" in said
    assert "learning rate" not in train(1, *cosine, "train.steps=6", "--check").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_disk_that_is_full_ends_the_run_in_words_and_it_goes_on_with_room(train, environment, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)], check=True)
    try:
        where = (f"run.root={tmp_path}", f"data.train={train.shards}", "run.name=full", "train.save_every=5")
        line = command(1, *where, "train.steps=100000", "train.keep_checkpoints=1")
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_rows(tmp_path / "full", 7, process)
        with contextlib.suppress(OSError):
            (tmp_path / "filler").write_bytes(bytes(6 << 20))
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 1 and "Traceback" not in said, said
        assert "No space left on device: the last checkpoint is good: make room in" in said
        (tmp_path / "filler").unlink()
        saved = [path for path in (tmp_path / "full" / "checkpoints").iterdir() if path.name.startswith("step-")]
        steps = int(saved[-1].name.removeprefix("step-"))
        goes_on = command(1, *where, f"train.steps={steps + 1}", "train.keep_checkpoints=1")
        subprocess.run(goes_on, env=environment, check=True, capture_output=True, timeout=600)
        assert [row["step"] for row in journal(tmp_path / "full")] == list(range(1, steps + 2))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_above_the_one_that_is_meant_names_it(train, undisturbed):
    done = train(1, "run.name=above", f"init={train.root}", "train.steps=1", check=False)
    assert done.returncode == 2 and f"no checkpoint in {train.root}" in done.stderr
    assert f"; did you mean {train.root}/" in done.stderr


def test_a_checkpoint_is_used_from_inside(undisturbed, environment):
    checkpoint = undisturbed / "checkpoints" / "step-000000024"
    line = forked.program(ROOT / "tools" / "generate.py", ".", "--prompt", "def", "--max-tokens", "3")
    done = subprocess.run(line, env=environment, cwd=checkpoint, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_held_out_data_that_is_trained_on_is_said(train, shards):
    """The splits of one folder are not one data set; a folder without splits is."""
    said = train(1, "run.name=split", *LENGTH, "--check").stdout
    assert "trained on too" not in said
    said = train(1, "run.name=same", "train.steps=1", data=shards / "train").stdout
    assert f"note: data.val={shards / 'train'} is trained on too: its figures are not of held-out text" in said
    assert f"data.val={shards / 'train'} is trained on too" in (train.root / "same" / "report.html").read_text()


@pytest.mark.slow
def test_32_ranks_are_killed_and_8_launched_for_real_go_on(train, environment):
    """As many processes as a machine can hold that are forked from one; what comes after is what torchrun starts."""
    wide = ("train.global_batch_size=32", "train.micro_batch_size=1", "deepspeed=zero2")
    assert disturb(train, environment, "many", 12, signal.SIGKILL, *wide, ranks=32) != 0
    where = (f"run.root={train.root}", f"data.train={train.shards}", f"data.val={train.shards}")
    line = [ROOT / "launch/torchrun.sh", *TINY, *where, "run.name=many", *LENGTH, *wide]
    real = environment | {"NPROC": "8", "PYTHON": sys.executable}
    done = subprocess.run(line, env=real, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    train(2, "run.name=few", *wide, *LENGTH)
    many, few = journal(train.root / "many"), journal(train.root / "few")
    assert [row["batch_hash"] for row in many] == [row["batch_hash"] for row in few] and len(many) == 24
    assert [row["loss"] for row in many] == pytest.approx([row["loss"] for row in few], rel=1e-4)
    (resumed,) = events(train.root / "many", "resume")
    assert resumed["ranks"] == 8 and resumed["step"] in (5, 10)
    assert events(train.root / "many", "start")[0]["ranks"] == 32
