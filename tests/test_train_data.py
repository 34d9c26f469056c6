"""Training from several sources, in phases, packed, under damage: on real ranks, killed and resumed."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pretrain.config import compose
from pretrain.dist import Ranks
from pretrain.shards import manifest as manifests
from pretrain.stream.mixture import Phase
from pretrain.stream.stream import DataError, Stream, batch_hash
from pretrain.train import make_plan
from tests import forked
from tests.conftest import TINY
from tests.forked import ROOT
from tests.http_store import serve
from tests.journals import events, exact, journal
from tests.test_train import disturb
from tools import show_batches

PHASES = (
    "train.phases=[{from_step: 6, seq_len: 64, global_batch_size: 4, micro_batch_size: 1}, "
    "{from_step: 10, weights: [1,3]}]"
)
STEPS = ("train.steps=14", "train.save_every=4", "train.eval_every=6")


@pytest.fixture(scope="module")
def second(shards, environment, tmp_path_factory) -> Path:
    """Another data set with the tokenizer of the first."""
    folder = tmp_path_factory.mktemp("second") / "data"
    texts = [str(Path(os.__file__).parent / name) for name in ("logging", "html", "xml")]
    line = forked.program(ROOT / "tools" / "write_shards.py", "--input", *texts, "--output", str(folder),
            "--tokenizer", str(shards.parent / "tokenizer.model"))  # fmt: skip
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=600)
    return folder


@pytest.fixture(scope="module")
def mixed(train, shards, second) -> list[str]:
    """The options of a run over two sources in three phases."""
    return [f"data.train=[{shards},{second}]", "data.weights=[2,1]", PHASES, *STEPS]


@pytest.fixture(scope="module")
def reference(train, mixed) -> Path:
    train(2, "run.name=mixed", *mixed)
    return train.root / "mixed"


@pytest.fixture(scope="module")
def killed(train, environment, mixed, second) -> Path:
    """The same, killed and resumed, and judged by two sets."""
    both = f"data.val=[own={train.shards},other={second}]"
    assert disturb(train, environment, "mixed-killed", 8, signal.SIGKILL, *mixed, both) != 0
    train(2, "run.name=mixed-killed", *mixed, both)
    return train.root / "mixed-killed"


@pytest.fixture(scope="module")
def begun(train, mixed, second) -> list[str]:
    """Options of the run `mixed-changed`, whose first phase is done, judged by the second of those sets alone."""
    start = [option for option in mixed if option not in (PHASES, *STEPS)]
    more = ("train.steps=6", "train.eval_every=14", "schedule.warmup_steps=5", f"data.val={second}", PHASES)
    train(2, "run.name=mixed-changed", *start, *more)
    return start


def test_a_run_in_phases_over_two_sources(reference, shards, second):
    rows = journal(reference)
    tokens = [8 * 32] * 6 + [4 * 64] * 8
    assert [row["tokens"] for row in rows] == np.cumsum(tokens).tolist()
    assert rows[-1]["loss"] < rows[0]["loss"]
    told = events(reference)
    assert [event["source"] for event in told if event["kind"] == "source"] == [f"{shards}/train", str(second)]
    assert [(e["from_step"], e["seq_len"]) for e in told if e["kind"] == "phase"] == [(0, 32), (6, 64), (10, 64)]
    for phase in (e for e in told if e["kind"] == "phase"):  # of one epoch of the first source, of several of the other
        assert phase["left"] == [] and 0 < phase["epochs"][0] < 1 and sum(phase["samples"]) in (48, 16)


def test_one_rank_and_a_killed_run_see_the_same_batches(train, mixed, killed, reference):
    train(1, "run.name=mixed-alone", *mixed)
    alone = journal(train.root / "mixed-alone")
    assert [row["batch_hash"] for row in alone] == [row["batch_hash"] for row in journal(reference)]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in journal(reference)], rel=1e-4)
    assert [row[:6] for row in exact(journal(killed))] == [row[:6] for row in exact(journal(reference))]


def test_the_figures_of_each_of_several_sets_are_those_of_a_run_with_it_alone(train, killed, begun, reference):
    """To the last bit, on 2 ranks."""
    both, own, other = (journal(run) for run in (killed, reference, train.root / "mixed-changed"))
    assert [row["step"] for row in both if "val_own/loss" in row] == [6, 12, 14]
    for name, alone, steps in (("own", own, (6, 12, 14)), ("other", other, (6,))):
        for step in steps:
            for figure in ("loss", "bits_per_byte"):
                assert both[step - 1][f"val_{name}/{figure}"] == alone[step - 1][f"val_{figure}"] > 0
    assert both[5]["val_own/loss"] != both[5]["val_other/loss"]
    figures = [name for name in both[5] if name.startswith("val_")]
    assert figures == [f"val_{name}/{figure}" for name in ("own", "other") for figure in ("loss", "bits_per_byte")]


def test_a_changed_length_at_a_resume_is_a_phase_like_a_planned_one(train, begun, second, reference):
    """As long as it is what was planned; another one begins a new epoch, and says what it leaves."""
    longer = ("train.seq_len=64", "train.global_batch_size=4", "train.micro_batch_size=1")
    done = train(2, "run.name=mixed-changed", *begun, *longer, "train.steps=10", "train.eval_every=14")
    assert "train.seq_len: 32 -> 64" in done.stdout and f"data.val: {second} -> {train.shards}" in done.stdout
    longest = ("train.seq_len=96", *longer[1:])
    done = train(1, "run.name=mixed-changed", *begun, *longest, "train.steps=12", "data.weights=[1,3]")
    changed, expected = journal(train.root / "mixed-changed"), journal(reference)
    same = [now["batch_hash"] == then["batch_hash"] for now, then in zip(changed, expected[:12], strict=True)]
    assert same == [True] * 10 + [False] * 2
    phases = [event for event in events(train.root / "mixed-changed") if event["kind"] == "phase"]
    assert [phase["from_step"] for phase in phases] == [0, 6, 0, 6, 10]  # the second resume knows of the first one's
    assert [min(phase["left"], default=0) > 0 for phase in phases] == [False, False, False, False, True]
    assert "left behind unread: " in done.stdout and "rows of 96 tokens are not made of rows of 64" in done.stdout


def test_show_batches_is_what_training_read(tool, reference, shards, capsys):
    def shown(*arguments) -> str:
        show_batches.main([str(reference), *map(str, arguments)])
        return capsys.readouterr().out

    rows = journal(reference)
    for step in (1, 6, 7, 14):
        said = shown("--step", step, "--characters", 0)
        assert f"batch hash {rows[step - 1]['batch_hash']} (as in the journal)" in said
        assert said.count("\nrow ") == (8 if step <= 6 else 4)
        assert re.search(rf"{shards}/train, epoch 0, 00000000.tar, chunk 0000000\d, row \d+ of", said)
    part = shown("--step", 3, "--rank", 1, "--world", 4)
    assert [line.split(",")[0] for line in part.splitlines() if line.startswith("row ")] == ["row 1", "row 5"]
    future = shown("--step", 5000)
    assert "(not trained on yet)" in future and "epoch 0" not in future
    done = tool("show_batches.py", reference, "--step", 2, "--world", 3, "--rank", 0, check=False)
    assert done.returncode == 2 and "--world 3 does not divide" in done.stderr


def test_packed_documents_under_a_mask_train_and_resume_bitwise(train, tmp_path):
    packed = ("data.packing=best_fit", "data.document_mask=true", f"data.cache={tmp_path}", "train.seq_len=128")
    train(1, "run.name=packed", *packed, "train.steps=6")
    rows = journal(train.root / "packed")
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["val_loss"] > 0
    (source,) = [event for event in events(train.root / "packed") if event["kind"] == "source"]
    assert 0.95 < source["fill_rate"] <= 1 and source["unused_tokens"] == 0
    for steps in (3, 6):
        train(1, "run.name=packed-resumed", *packed, f"train.steps={steps}", "train.eval_every=6")
    assert [row[:6] for row in exact(journal(train.root / "packed-resumed"))] == [row[:6] for row in exact(rows)]
    done = train(1, "run.name=packed", *packed[1:], "--check", check=False)
    assert done.returncode == 2 and "data.packing: best_fit -> window" in done.stderr


@pytest.fixture(scope="module")
def chunked(shards, environment, tmp_path_factory) -> Path:
    """A data set of several shards with many small chunks."""
    folder = tmp_path_factory.mktemp("chunked") / "data"
    line = forked.program(ROOT / "tools" / "write_shards.py", "--input", str(Path(os.__file__).parent / "json"),
            "--tokenizer", str(shards.parent / "tokenizer.model"), "--output", str(folder), "--chunk-tokens", "1000",
            "--shard-mb", "0.01")  # fmt: skip
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=600)
    return folder


def flip(folder: Path, shard: int, chunk: int) -> None:
    """Flip a bit among the tokens of a chunk."""
    manifest = manifests.load(folder)
    place = int(manifest.chunks(shard)[chunk]["tokens_offset"]) + 101
    with open(folder / manifest.shards[shard].name, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_chunk_ends_the_run_in_words(train, chunked, tmp_path):
    folder = shutil.copytree(chunked, tmp_path / "damaged")
    for chunk in range(len(manifests.load(folder).chunks(0))):
        flip(folder, 0, chunk)
    done = train(1, "run.name=damaged", "train.steps=50", "data.val=null", data=folder, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "00000000.tar is damaged in chunk 0000000" in done.stderr and "data.quarantine=true" in done.stderr


def test_what_comes_before_a_damaged_batch_is_trained_and_written(train, chunked, tmp_path):
    for chunk in range(20):  # one that is met after some batches
        folder = shutil.copytree(chunked, tmp_path / f"damaged-{chunk}")
        flip(folder, 0, chunk)
        batches, whole = Stream([manifests.load(folder)], [Phase(0, 32, 8, (1.0,))], seed=0).batches(0), 0
        with pytest.raises(DataError):
            while next(batches):
                whole += 1
        if whole > 2:
            break
    options = (
        "run.name=before-damage",
        "train.steps=50",
        "train.save_every=100",
        "train.eval_every=0",
        "data.val=null",
    )
    train(1, *options, data=folder, check=False)
    assert len(journal(train.root / "before-damage")) == whole > 2


def test_quarantine_is_the_same_in_every_world_and_after_the_damage_is_gone(train, chunked, tmp_path):
    folder = shutil.copytree(chunked, tmp_path / "damaged")
    for shard, chunk in ((0, 1), (0, 2), (1, 0)):
        flip(folder, shard, chunk)
    options = ("data.quarantine=true", "data.val=null", "train.save_every=10", "train.eval_every=0", "train.steps=20")
    train(2, "run.name=quarantine", *options, data=folder)
    found = [row["batch_hash"] for row in journal(train.root / "quarantine")]
    told = [(e["shard"], e["chunk"]) for e in events(train.root / "quarantine") if e["kind"] == "quarantined"]
    assert sorted(told) == [("00000000.tar", 1), ("00000000.tar", 2), ("00000001.tar", 0)]
    train(1, "run.name=quarantine-repaired", *options[:-1], "train.steps=10", data=folder)
    for shard, chunk in ((0, 1), (0, 2), (1, 0)):
        flip(folder, shard, chunk)
    train(2, "run.name=quarantine-repaired", *options, data=folder)
    assert [row["batch_hash"] for row in journal(train.root / "quarantine-repaired")] == found
    stream = Stream([manifests.load(folder)], [Phase(0, 32, 8, (1.0,))], seed=0)
    whole = [batch_hash(stream.rows(stream.numbers(step)).digests()) for step in range(20)]
    assert 0 < sum(a == b for a, b in zip(whole, found, strict=True)) < 20  # only batches with damaged rows differ


def test_training_from_a_url_is_training_from_its_folder(train, chunked, tmp_path):
    options = ("data.val=null", "train.steps=12", "train.eval_every=0")
    train(1, "run.name=local", *options, data=chunked)
    with serve(chunked) as server:
        server.fail("index.json", "busy", 2)
        server.fail("00000001.tar", "wrong")
        server.fail("00000002.tar", "short")
        done = train(2, "run.name=remote", *options, f"data.cache={tmp_path}", data=server.url)
        shards = [path for path in server.requests if path.endswith(".tar")]
        assert shards and all(server.requests[path] <= 3 for path in shards)  # once, and again after each fault
    assert "wrong content" in done.stderr and "attempt 2 of 5" in done.stderr
    found, expected = (journal(train.root / name) for name in ("remote", "local"))
    assert [row["batch_hash"] for row in found] == [row["batch_hash"] for row in expected]


def test_training_on_tars_that_stock_webdataset_wrote(train, tool, shards, tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    tokens = np.concatenate([sample["tokens.npy"] for sample in webdataset.WebDataset(
        str(shards / "val" / "00000000.tar"), shardshuffle=False).decode()])  # fmt: skip
    with webdataset.ShardWriter(f"{folder}/part-%03d.tar", maxcount=7, verbose=0) as sink:
        for number, part in enumerate(np.array_split(tokens, 20)):
            sink.write({"__key__": f"s{number}", "tokens.npy": part.astype(np.uint16)})
    said = tool("verify_shards.py", folder, "--rebuild", "--tokenizer", shards.parent / "tokenizer.model").stdout
    assert "3 shards" in said
    train(1, "run.name=stock", "data.val=null", "train.steps=3", "train.eval_every=0", data=folder)
    stream = Stream([manifests.load(folder)], [Phase(0, 32, 8, (1.0,))], seed=0)
    expected = [batch_hash(stream.rows(stream.numbers(step)).digests()) for step in range(3)]
    assert [row["batch_hash"] for row in journal(train.root / "stock")] == expected


def test_an_address_that_is_none_is_refused_and_never_run(train, tmp_path):
    marker = tmp_path / "marker"
    for address in (f"pipe:touch {marker}", f"file://x/../pipe:touch {marker}"):
        done = train(1, "run.name=mistaken", data=address.replace(" ", "\\ "), check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: the address "), done.stderr
        assert not marker.exists()


def looks_at_files(cfg, ranks: Ranks, monkeypatch) -> int:
    """How often a plan asks the file system for something."""
    count, stat = 0, os.stat
    opens = []
    watching = True

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return stat(*args, **kwargs)

    sys.addaudithook(lambda event, _: opens.append(event) if watching and event == "open" else None)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", counted)
        make_plan(cfg, ranks)
    watching = False
    return count + len(opens)


def test_rank_0_looks_at_each_shard_and_the_others_trust_it(train, shards, chunked, monkeypatch, tmp_path):
    few = tmp_path / "few"
    line = ("--input", str(Path(os.__file__).parent / "json"), "--tokenizer", str(shards.parent / "tokenizer.model"))
    done = forked.program(ROOT / "tools" / "write_shards.py", *line, "--output", few)
    subprocess.run(done, env=forked.ENVIRONMENT, check=True, capture_output=True, timeout=600)
    counts = {}
    for folder in (few, chunked):
        overrides = [f"run.root={tmp_path}", "run.name=x", f"data.train={folder}", f"data.val={folder}", *TINY]
        cfg = compose.compose("pretrain", overrides)
        for rank in (0, 1):
            counts[folder, rank] = looks_at_files(cfg, Ranks(rank, 2, rank), monkeypatch)
    more = len(manifests.load(chunked).shards) - len(manifests.load(few).shards)
    assert more >= 3 and counts[chunked, 0] >= counts[few, 0] + 2 * more
    assert counts[chunked, 1] == counts[few, 1]
    holed = shutil.copytree(chunked, tmp_path / "holed")
    (holed / "00000002.tar").unlink()
    done = train(2, "run.name=holed", "data.val=null", data=holed, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "00000002.tar is missing, index.json lists it" in done.stderr
