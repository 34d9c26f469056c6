"""Published weights, a BERT and a LLaMA: they come in, compute what transformers computes, train on, and go out."""

import json

import numpy as np
import pytest
import torch
import transformers

from pretrain.checkpoint.tensors import TensorFolder
from pretrain.shards.manifest import load
from pretrain.stream.mixture import Phase
from pretrain.stream.stream import Stream
from tests.real_models import english_prose, published

pytestmark = pytest.mark.slow
LENGTH, BATCH = 256, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory, environment):
    return published(tmp_path_factory.mktemp("published"), environment)


@pytest.fixture(scope="module")
def imported(models, tool, tmp_path_factory):
    """The runs of both, imported by the tool, which compares them with transformers."""
    runs = tmp_path_factory.mktemp("runs")
    for source, name in zip(models, ("minilm", "smollm2"), strict=True):
        done = tool("import_hf.py", source, "--output", runs / name)
        assert "equal to transformers" in done.stdout, done.stdout
        proof = json.loads((runs / name / "imported.json").read_text())["proof"]
        assert proof["max_difference"] <= 1e-4
        assert (proof["continued_tokens"] > 0) == (name == "smollm2")
    return runs


def test_they_are_exported_as_they_came(models, imported, tool, tmp_path):
    for source, name in zip(models, ("minilm", "smollm2"), strict=True):
        done = tool("export_hf.py", imported / name, "--output", tmp_path / name)
        assert "equal to transformers" in done.stdout, done.stdout
        before, after = TensorFolder(source), TensorFolder(tmp_path / name)
        left_out = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}  # no part of an embedding
        assert set(before.names) - set(after.names) <= left_out
        assert all(torch.equal(before.read(key).float(), after.read(key)) for key in after.names)


def test_continued_pretraining_starts_at_the_models_own_loss(models, imported, train, tool, tmp_path):
    tool("write_shards.py", "--input", english_prose(tmp_path), "--tokenizer", imported / "smollm2",
         "--output", tmp_path / "prose")  # fmt: skip
    train(
        2, f"init={imported / 'smollm2'}", "run.name=prose", "train.steps=1", "optim.lr=1e-5",
        f"train.seq_len={LENGTH}", f"train.global_batch_size={BATCH}", "train.micro_batch_size=4", "deepspeed=zero1",
        "data.val=null", "log.sample_tokens=0", data=tmp_path / "prose",
    )  # fmt: skip
    journal = (train.root / "prose" / "metrics.jsonl").read_text()
    rows = Stream([load(tmp_path / "prose")], [Phase(0, LENGTH, BATCH, (1.0,))], seed=0).rows(np.arange(BATCH))
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    model = transformers.AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert json.loads(journal.splitlines()[0])["loss"] == pytest.approx(expected, rel=1e-5)
    assert 10 < np.exp(expected) < 25
