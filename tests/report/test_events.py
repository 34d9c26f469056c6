"""Events in words: what a run did, as its console and its report say it."""

import pytest

from pretrain.report import events
from pretrain.report.events import folded, marks, told, told_together

START = {
    "kind": "start", "step": 0, "checkpoint": None, "ranks": 2, "zero_stage": 1, "precision": "fp32", "device": "cpu",
    "peak_source": "measured fp32 matrix product", "peak_tflops": 2.530626139564422,
}  # fmt: skip
SOURCE = {"kind": "source", "source": "shards/web", "share": 0.75, "rows": 1234, "epochs": 1.4987, "fill_rate": 1.0}
PHASE = {"kind": "phase", "from_step": 30, "seq_len": 1024, "global_batch_size": 8, "sources": ["web", "books"],
         "samples": [300, 100], "epochs": [0.12345, 2.5]}  # fmt: skip
EXAMPLES = {"kind": "source", "examples": 1200, "tokens": 40000, "epochs": 3.0, "longest": 700, "dropped": 0}


@pytest.mark.parametrize("event, words", [
    (START, "step 0; 2 x cpu, fp32, ZeRO stage 1; peak 2.5 TFLOP/s (measured fp32 matrix product)"),
    (START | {"ranks": 1, "threads": 8},
     "step 0; 1 x cpu of 8 threads, fp32, ZeRO stage 1; peak 2.5 TFLOP/s (measured fp32 matrix product)"),
    (START | {"kind": "resume", "step": 1200, "checkpoint": "step-000001200", "peak_tflops": 15824.0, "device": "cuda",
              "peak_source": "NVIDIA H100, dense bf16 data sheet", "ranks": 16, "threads": 6},
     "step 1,200, from step-000001200; 16 x cuda, fp32, ZeRO stage 1; peak 15.8 PFLOP/s (NVIDIA H100, dense bf16 data "
     "sheet)"),
    ({"kind": "saved", "step": 100, "seconds": 0.6178, "megabytes": 28.81}, "step 100: 28.8 MB in 0.62 s"),
    ({"kind": "saved", "step": 100, "seconds": 61.2, "megabytes": 16060.0}, "step 100: 16.1 GB in 61 s"),
    ({"kind": "save_failed", "step": 100, "seconds": 0.6178, "error": "no room"}, "step 100, after 0.62 s: no room"),
    ({"kind": "compiled", "seconds": 23.456}, "the blocks of the model, in 23 s"),
    ({"kind": "not_compiled", "problem": "no compiler"}, "the blocks of the model: no compiler"),
    (SOURCE | {"unused_tokens": 0}, "shards/web: 75.0% of the tokens, 1.5 epochs of 1,234 rows"),
    (SOURCE | {"unused_tokens": 99, "fill_rate": 0.985},
     "shards/web: 75.0% of the tokens, 1.5 epochs of 1,234 rows 98.5% full, 99 tokens in none"),
    (EXAMPLES | {"cut": 0, "cut_tokens": 0}, "1,200 examples of 40,000 tokens, 3 epochs; the longest has 700 tokens"),
    (EXAMPLES | {"cut": 7, "cut_tokens": 800, "dropped": 2},
     "1,200 examples of 40,000 tokens, 3 epochs; the longest has 700 tokens, 7 cut by 800 tokens in all, 2 dropped"),
    (PHASE | {"left": [], "reason": None},
     "from step 30 on 8 samples of 1,024 tokens: 75.0% web, 0.123 epochs; 25.0% books, 2.5 epochs"),
    (PHASE | {"left": [1234, 0], "reason": "best_fit packs the documents anew for each length"},
     "from step 30 on 8 samples of 1,024 tokens: 75.0% web, 0.123 epochs; 25.0% books, 2.5 epochs; left behind unread: "
     "1,234 rows of web (best_fit packs the documents anew for each length)"),
    ({"kind": "initialised", "init": "runs/base", "anew": []}, "from runs/base"),
    ({"kind": "initialised", "init": "runs/base", "anew": ["a", "b"], "reasons": ["a: LoRA", "b: its labels are"]},
     "from runs/base; begins anew: a: LoRA; b: its labels are"),
    ({"kind": "initialised", "init": "runs/base", "anew": [f"w{i}" for i in range(10)]},
     "from runs/base; begins anew: w0, w1, w2, w3, w4, w5, w6, w7 and 2 more"),
    ({"kind": "journal", "step": 5, "rows_cut": 3, "rows_missing": 1},
     "rows of step 5: 3 after it cut off, 1 before it missing"),
    ({"kind": "wandb", "problem": "online failed: a\nb", "instead": "offline"},
     "online failed: a b; instead: offline"),
    ({"kind": "stopped", "step": 7, "reason": "SIGTERM"}, "step 7: SIGTERM"),
    ({"kind": "end", "step": 640, "of": 640, "report": "runs/x/report.html"}, "step 640 of 640"),
    ({"kind": "not_finite", "step": 3, "loss": None, "grad_norm": 0.123456}, "step 3, grad norm 0.1235"),
    ({"kind": "saved", "step": 50, "reason": "x"}, "step 50, reason x"),  # of another version
    ({"kind": None}, ""),
])  # fmt: skip
def test_each_kind(event, words):
    assert told(event | {"time": "2026-11-24T09:46:28.939+00:00"}) == words


def test_saves_that_follow_each_other_are_one_line():
    def save(step, minute, seconds):
        time = f"2026-11-24T09:{minute}:00.000+00:00"
        return {"kind": "saved", "time": time, "step": step, "seconds": seconds, "megabytes": 28.8}

    saves = [save(10, 10, 0.41), save(20, 20, 0.62), save(30, 30, 0.5)]
    groups = list(folded([START, *saves, {"kind": "stopped"}, saves[0], {"kind": "end"}, {"kind": "end"}]))
    assert [len(group) for group in groups] == [1, 3, 1, 1, 1, 1]
    assert told_together(groups[1]) == (
        "3 times until 2026-11-24 09:30:00, steps 10 to 30: 28.8 MB each, in 0.41 to 0.62 s"
    )
    assert told_together(groups[3]) == "step 10: 28.8 MB in 0.41 s"
    for damaged in ({"kind": "saved", "step": "x"}, {"step": "x", "megabytes": 1.0, "seconds": 1.0}, {"step": None}):
        assert told_together([damaged, saves[0]]) == "2 times"


def test_what_is_marked_on_curves():
    happened = [
        START, {"kind": "phase", "from_step": 25}, {"kind": "resume", "step": 20}, {"kind": "resume", "step": 10},
        {"kind": "phase", "from_step": 0}, {"kind": "phase", "from_step": 30}, {"kind": "phase", "from_step": 30},
        {"kind": "phase", "from_step": 90}, {"kind": "save_failed", "step": 12}, {"kind": "not_finite", "step": None},
    ]  # fmt: skip
    assert marks(happened, 50) == {"resume": [10, 20], "phase": [30], "fault": [12]}, "as planned at last, and come to"
    assert marks([START], 50) == {} == marks(happened, float("nan"))
    assert events.listed(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"
