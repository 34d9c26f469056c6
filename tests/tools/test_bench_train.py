"""tools/bench_train.py: every contestant has its row, the figures agree with each other, and the terms are the same.
How fast anything is decides no test.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pretrain.config import compose
from pretrain.model.heads import build_model
from pretrain.model.initial import fill_initial
from pretrain.model.losses import loss_rows
from pretrain.model.transformer import flops_per_token
from pretrain.optim import optimizers
from tests import forked
from tests.forked import ROOT, program
from tools import bench_train, bench_train_others, bench_train_pieces

SMALL = ["model=llama_tiny", "model.vocab_size=512", "train.seq_len=32", "train.global_batch_size=8", "log=none",
         "train.micro_batch_size=2", "train.precision=fp32", "schedule.warmup_steps=3", "optim.lr=1e-2",
         "optim.grad_clip=0.2"]  # fmt: skip
ONCE = ["--ranks", "1", "--rounds", "1", "--steps", "4"]
OURS = "pretrain, 1 rank x 1 thread"


@pytest.fixture(scope="module")
def ran(environment, tmp_path_factory):
    """One run with everything: what it printed, what it wrote, where the traces are."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--profile", folder / "profile", "--json", folder / "found.json"]
    line = program(ROOT / "tools" / "bench.py", "train", *SMALL, *ONCE, *options)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder / "found.json", folder / "profile"


def test_every_contestant_has_its_row_and_what_cannot_run_says_why(ran):
    facts = json.loads(ran[1].read_text())
    names = [OURS, "bare loop", "its matrix products", "Trainer of transformers", "nanoGPT's loop"]
    assert [row["name"] for row in facts["contestants"]] == names and not facts["failed"]
    assert facts["absent"] == {"nanoGPT's loop, autocast": "this run is in fp32"}
    for row in facts["contestants"]:
        (speed,), (cpu,) = row["tokens_per_second"], row["cpu_seconds_per_step"]
        assert speed > 0 and cpu > 0 and row["peak_bytes"] > 1e7
        assert re.search(f"^{row['name']} +{speed:,.0f} +{speed:,.0f} +{speed:,.0f} +{cpu:.3f} ", ran[0].stdout, re.M)
    assert re.search("^nanoGPT's loop, autocast +this run is in fp32$", ran[0].stdout, re.M)
    assert facts["environment"]["cpu"] in ran[0].stdout and facts["train"]["global_batch_size"] == 8


def test_ratios_are_of_the_figures_and_printed_as_written(ran, tool):
    facts = json.loads(ran[1].read_text())
    speed = {row["name"]: row["tokens_per_second"][0] for row in facts["contestants"]}
    pairs = {(each["of"], each["to"]): each for each in facts["ratios"]}
    assert set(pairs) == {(OURS, name) for name in speed if name != OURS} | {("bare loop", "its matrix products")}
    for (of, to), each in pairs.items():
        assert each["minimum"] == each["median"] == pytest.approx(speed[of] / speed[to])
    assert tool("bench_train_table.py", ran[1]).stdout.strip() == ran[0].stdout.strip()


def test_a_ratio_takes_each_round_by_itself():
    rows = [{"name": "a", "key": "ours", "tokens_per_second": [2.0, 9.0, 8.0]},
            {"name": "b", "key": "bare", "tokens_per_second": [4.0, 10.0, 10.0]}]  # fmt: skip
    (found,) = bench_train.ratios(rows)
    assert found["rounds"] == [0.5, 0.9, 0.8] and found["minimum"] == 0.5 and found["median"] == 0.8


def test_the_bare_loop_trains_the_same(ran):
    """Its losses are those of the program's journal: the same values, batches, clipping and optimizer."""
    (found,) = json.loads(ran[1].read_text())["losses"]
    assert found["name"] == OURS and found["steps"] >= 5 and found["largest"] <= 1e-5


def test_the_bare_loop_steps_by_muon_where_the_run_does():
    overrides = [*SMALL, "run.name=x", "model.tied_embeddings=false", "model.value_embeddings=1", "optim=muon",
                 "optim.adamw_lr_scale=0.5", "optim.embedding_lr_scale=4"]  # fmt: skip
    cfg = compose.compose("pretrain", overrides)
    generator = torch.Generator().manual_seed(0)
    parts = [{name: torch.randint(0, 512, (2, 32), generator=generator) for name in ("inputs", "labels")}] * 6
    loop = bench_train_others.BareLoop(build_model(cfg.model), loss_rows, cfg.optim)
    loop.fill(cfg.model, 0)
    model = build_model(cfg.model)
    for name, parameter in model.named_parameters():
        fill_initial(parameter.data.view(-1), 0, name, tuple(parameter.shape), cfg.model, 0)
    optimizer = optimizers.build(cfg.optim, model.named_parameters())
    groups = [*optimizer.param_groups, *(group for each in loop.optimizers for group in each.param_groups)]
    terms = {id(p): (group.get("lr_scale", group.get("scale")), group["weight_decay"])
             for group in groups for p in group["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        assert terms[id(loop.masters[name])] == terms[id(parameter)], name
    for part in parts:
        rows = loss_rows(model, **part).sum() / 64
        optimizer.zero_grad()
        rows.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.lr * group["lr_scale"]
        optimizer.step()
        assert loop.step([part], cfg.optim.lr) == pytest.approx(rows.item(), abs=5e-3)  # torch's is in bf16
    assert rows.item() < 5, "it learns"


def test_the_bare_loop_says_what_it_cannot():
    cfg = compose.compose("pretrain", [*SMALL, "run.name=x", "model.tied_embeddings=false", "optim.base_width=64"])
    with pytest.raises(ValueError, match="optim.base_width"):
        bench_train_others.bare(lambda watches: None, cfg, iter(()), torch.float32)


def test_the_profile_adds_up_and_names_nearly_all(ran):
    mine, bare = json.loads(ran[1].read_text())["profiles"]
    assert mine["name"] == OURS and bare["name"] == "bare loop"
    assert set(mine["sections"]) == {
        "data", "forward", "backward", "backward: gradients taken in", "optimizer: norm, clipping, copies",
        "optimizer: update", "communication", "logging", "waiting", "other",
    }  # fmt: skip
    for profile in (mine, bare):
        parts = profile["sections"].values()
        assert sum(part["share"] for part in parts) == pytest.approx(1)
        assert sum(part["seconds"] for part in parts) == pytest.approx(profile["step_seconds"], rel=0.05)
        assert all(part["seconds"] > 0 for part in (profile["sections"][name] for name in ("forward", "backward")))
        assert sum(profile["threads"].values()) > 0
        assert any(each["name"] == "aten::mm" for each in profile["operators"])
    assert {path.name for path in ran[2].iterdir()} == {"ours-1-rank0.json", "bare-1-rank0.json"}
    names = {event["name"] for event in json.loads((ran[2] / "ours-1-rank0.json").read_text())["traceEvents"]}
    assert {"data", "forward", "optimizer: update", "aten::mm"} <= names


def test_a_moment_counts_for_the_innermost_function_that_is_watched(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_train_pieces, "clocks", lambda: (now[0], 10 * now[0]))

    class Work:
        def outer(self) -> None:
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self) -> None:
            now[0] += 4

    work, sections = Work(), bench_train_pieces.Sections()
    sections.watch(work, "outer", "a")
    sections.watch(work, "inner", "b")
    work.outer()
    sections.begin()
    now[0] += 8
    work.outer()
    now[0] += 16
    assert sections.end() == {"a": [3.0, 30.0], "b": [4.0, 40.0], "other": [24.0, 240.0]}


def test_a_contestant_ends_with_its_standard_input(environment):
    facts = {"overrides": ["run.name=x", *SMALL], "rows": 2}
    line = program(ROOT / "tools" / "bench_train_pieces.py", "floor", json.dumps(facts))
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(line, env=environment, **options)
    assert done.returncode == 0 and json.loads(done.stdout) == {"losses": []}, done.stderr


@pytest.mark.parametrize("overrides, predicted", [
    (["model=llama_tiny", "model.vocab_size=512"], 1.0),
    (["model=gpt2_124m"], 1.0),
    (["model=llama_1b", "model.kv_heads=4"], 1.0),
    (["model=bert_base", "model.head=lm", "model.vocab_size=1000"], 0.25),
])  # fmt: skip
def test_the_products_are_those_that_flops_per_token_counts(overrides, predicted):
    model = compose.compose("pretrain", ["run.name=x", "train.seq_len=64", *overrides]).model
    products = bench_train_others.products_of(model, 2, 64, predicted)
    assert sum(product.flops for product in products) == 2 * 64 * flops_per_token(model, 64, predicted)


def test_a_contestant_that_ends_says_why_and_the_others_go_on(tool, tmp_path):
    """No architecture of Hugging Face has these parts."""
    out = tmp_path / "found.json"
    line = [*SMALL, "model.positions=sinusoidal", *ONCE, "--against", "trainer", "floor", "--json", out]
    done = tool("bench_train.py", *line, check=False)
    facts = json.loads(out.read_text())
    assert done.returncode == 1 and [row["name"] for row in facts["contestants"]] == [OURS, "its matrix products"]
    assert "no architecture of Hugging Face" in facts["failed"]["Trainer of transformers"]
    assert re.search("^Trainer of transformers +FAILED; the end of what it said:$", done.stdout, re.M)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 75), (signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_whatever_ends_it_ends_what_it_started(environment, number, code):
    line = program(ROOT / "tools" / "bench_train.py", *SMALL, "--ranks", "2", "--rounds", "999", "--against")
    running = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE)
    try:
        said = b""
        while b"round 1 of 999" not in said:
            more = os.read(running.stderr.fileno(), 1 << 16)
            assert more, said
            said += more
        (tool,) = forked.ranks_of(running.pid)
        begun = children(tool)
        assert len(begun) == 2
        folder = re.search(r"run\.root=([^\"]+)", Path(f"/proc/{begun[0]}/cmdline").read_text())[1]
        begun += [pid for launch in begun for pid in forked.ranks_of(launch)]
        assert len(begun) == 4 and Path(folder).exists()
        os.kill(tool, number)
        assert running.wait(60) == code
        while any(map(is_alive, begun)):
            time.sleep(0.05)
        assert Path(folder).exists() == (number == signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        running.kill()
        running.communicate()


def children(parent: int) -> list[int]:
    stats = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()}
    return [pid for pid, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == parent]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None if name == "accelerate" else name)
    assert bench_train.why_absent("trainer", "bf16") == "not installed (pip install transformers accelerate)"
    assert bench_train.why_absent("nanogpt", "bf16") is None


@pytest.mark.parametrize("arguments, said", [
    (["model=lama"], "error: "),
    (["model=llama_tiny", "train.global_batch_size=8", "train.micro_batch_size=3"], "error: train.global_batch_size=8"),
    (["data.train=nowhere"], "error: "),
    (["--ranks", "0"], "--ranks, --rounds and --steps count from 1"),
    (["--against", "megatron"], "invalid choice: 'megatron'"),
])  # fmt: skip
def test_mistakes_are_explained(tool, arguments, said):
    done = tool("bench_train.py", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches(tool):
    said = tool("bench.py", "train", "--help").stdout
    assert "experiment=quickstart data.train=" in said and all(name in said for name in bench_train.NAMES)
