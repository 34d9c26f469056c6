"""A run that an earlier version began, with its data (`begun_before/`), goes on as if nothing had changed since.

It was made when checkpoints had format 1: 4 of 8 steps on 2 ranks with ZeRO-1. whole.jsonl is the journal of the same
run of that version in one go.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.journals import events, journal

BEFORE = Path(__file__).parent / "begun_before"
SETTINGS = (
    "model=llama_tiny", "model.width=16", "model.heads=2", "model.kv_heads=1", "model.layers=1", "model.ffn_width=32",
    "train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=fp32",
    "schedule=constant", "schedule.warmup_steps=2", "optim.lr=1e-2", "log=none", "log.sample_tokens=0",
    "train.eval_samples=8", "train.save_every=4", "train.eval_every=0", "data.train=data", "data.val=data",
    "run.root=runs", "run.name=begun",
)  # fmt: skip


@pytest.mark.parametrize("ranks, stage", [(2, 1), (1, 3)])
def test_it_goes_on(tmp_path, ranks, stage):
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    line = forked.program("-m", "pretrain.train", *SETTINGS, f"deepspeed=zero{stage}", "train.steps=8", ranks=ranks)
    subprocess.run(line, env=forked.ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    run = tmp_path / "runs" / "begun"
    assert [event["step"] for event in events(run, "resume")] == [4]
    whole = [json.loads(line) for line in (BEFORE / "whole.jsonl").read_text().splitlines()]
    for now, before in zip(journal(run), whole, strict=True):
        for name in ("step", "tokens", "lr"):  # a batch's hash was another then
            assert now[name] == before[name], name
        for name in ("loss", "grad_norm"):  # to the last bit on the processor that it began on
            assert now[name] == pytest.approx(before[name], rel=1e-4), name
