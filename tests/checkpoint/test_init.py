"""A run that starts from the weights of another: its model, its first loss, and what is refused."""

import shutil

import numpy as np
import pytest
import torch

from pretrain.checkpoint.load import Weights, checkpoint_of, load_model, read_header
from pretrain.checkpoint.save import write_weights
from pretrain.model.heads import parameter_shapes
from pretrain.model.losses import cross_entropy_rows
from pretrain.shards.manifest import open_split
from pretrain.stream.mixture import Phase
from pretrain.stream.objectives import causal_lm
from pretrain.stream.stream import Stream
from tests.journals import events, journal

ONE_STEP = ("train.steps=1", "data.val=null", "log.sample_tokens=0", "optim.lr=1e-9")


@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 3)])
def test_the_first_loss_is_that_of_the_model_it_starts_from(train, undisturbed, ranks, stage):
    name = f"from-{ranks}-{stage}"
    train(ranks, f"init={undisturbed}", f"run.name={name}", f"deepspeed=zero{stage}", "seed=3", *ONE_STEP)
    stream = Stream([open_split(train.shards, "train")], [Phase(0, 32, 8, (1.0,))], seed=3)
    inputs, labels = map(torch.from_numpy, causal_lm(stream.rows(np.arange(8))))
    with torch.no_grad():
        rows = cross_entropy_rows(load_model(undisturbed)(inputs), labels)
    found = journal(train.root / name)[0]["loss"]
    assert found == pytest.approx(rows.sum().item() / int((labels >= 0).sum()), rel=1e-5)
    first = journal(undisturbed)[0]["loss"]
    assert found < first - 0.5, "it must have learned something before"
    assert events(train.root / name, "initialised")[0]["anew"] == []
    header = read_header(checkpoint_of(train.root / name))
    assert header.model == read_header(checkpoint_of(undisturbed)).model and header.optimizer_steps == 1


def test_what_the_command_line_says_of_the_model_holds_and_a_missing_head_begins_anew(train, undisturbed, tmp_path):
    weights = Weights(undisturbed)
    bare = tmp_path / "bare"
    bare.mkdir()
    config = weights.config.__class__(**{**vars(weights.config), "head": "none", "tied_embeddings": False})
    write_weights(bare, config, weights.read)
    (bare / "tokenizer.model").write_bytes((undisturbed / "tokenizer.model").read_bytes())
    assert "head.weight" not in parameter_shapes(config)
    train(1, f"init={bare}", "run.name=new-head", "model.head=lm", "model.dropout=0.25", *ONE_STEP)
    assert events(train.root / "new-head", "initialised")[0]["anew"] == ["head.weight"]
    found = Weights(train.root / "new-head")
    assert found.config.dropout == 0.25 and found.config.width == config.width
    assert torch.allclose(found.read("trunk.embedding.weight"), weights.read("trunk.embedding.weight"), atol=1e-6)
    assert 0.01 < found.read("head.weight").std() < 0.03


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model=llama_14m"], "brings its own model"),
        (["model.layers=3"], "trunk.blocks.2"),
        (["model.ffn_width=256"], "trunk.blocks.0.ffn.up.weight has shape"),
        (["objective=masked_lm"], "take objective=causal_lm"),
        (["init=/nowhere"], "no checkpoint in /nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(train, undisturbed, overrides, words):
    done = train(1, f"init={undisturbed}", "run.name=refused", *overrides, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (train.root / "refused").exists()


def test_a_run_goes_on_when_what_it_started_from_is_gone(train, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "source")
    line = (f"init={tmp_path / 'source'}", "run.name=orphan", "model.dropout=0.1", *ONE_STEP)
    train(1, *line)
    shutil.rmtree(tmp_path / "source")
    train(1, *line, "train.steps=2")
    assert [row["step"] for row in journal(train.root / "orphan")] == [1, 2]
    other = train(1, *line, "run.name=another", check=False)
    assert other.returncode == 2 and "no checkpoint in" in other.stderr, other.stderr


def test_damaged_weights_are_refused(train, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "damaged")
    newest = checkpoint_of(tmp_path / "damaged")
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = train(1, f"init={tmp_path / 'damaged'}", "run.name=refused", *ONE_STEP, check=False)
    assert done.returncode == 2 and "the manifest says" in done.stderr, done.stderr


def test_shards_of_another_tokenizer_are_refused(train, undisturbed, tool, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: a few words, and then some more of them\n" for i in range(2000)))
    tool("train_tokenizer.py", "--input", text, "--vocab-size", "300", "--output", tmp_path / "other.model")
    tool("write_shards.py", "--input", text, "--tokenizer", tmp_path / "other.model", "--output", tmp_path / "other")
    line = [f"init={undisturbed}", "run.name=refused", "data.val=null"]
    done = train(1, *line, data=tmp_path / "other", check=False)
    assert done.returncode == 2 and f"write_shards.py --tokenizer {undisturbed}" in done.stderr, done.stderr


def test_a_run_takes_the_vocabulary_of_its_tokenizer_and_not_the_presets(train):
    small = ("model=gpt2_124m", "model.layers=1", "model.width=32", "model.heads=2")
    for name, vocab_size, override in (("tokenizers", 512, ()), ("stated", 640, ("model.vocab_size=640",))):
        train(1, *small, *override, f"run.name={name}", *ONE_STEP)
        assert Weights(train.root / name).config.vocab_size == vocab_size
    done = train(1, *small, "model.vocab_size=500", "run.name=less", check=False)
    assert done.returncode == 2 and "model.vocab_size=500" in done.stderr
