"""Validation against a plain computation, and tools/evaluate.py with its baselines."""

import gzip
import json
import math

import numpy as np
import pytest
import torch

from pretrain import checkpoint, dist
from pretrain.data import manifest as manifests
from pretrain.data.objectives import IGNORE, causal_lm
from pretrain.data.stream import Stream
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.losses import cross_entropy_rows
from tools import evaluate as tool_module


@pytest.fixture(scope="module")
def held_out(shards):
    return Stream.in_order(manifests.load(shards / "val"), 32)


def plain_bits(model, tokenizer, stream, windows):
    """(nats a token, bits a byte of the target text), one window at a time."""
    nats = targets = text_bytes = 0
    lengths = tokenizer.byte_lengths()
    for window in windows:
        inputs, labels = causal_lm(stream.rows(np.array([window])))
        nats += float(cross_entropy_rows(model(torch.from_numpy(inputs)), torch.from_numpy(labels)))
        counted = labels[labels != IGNORE]
        targets += len(counted)
        text_bytes += int(lengths[counted].sum())
    return nats / targets, nats / math.log(2) / text_bytes


def test_the_loops_validation_is_the_plain_computation_on_windows_spread_evenly(undisturbed, held_out):
    model, tokenizer = checkpoint.load_model(undisturbed), Tokenizer(undisturbed / "tokenizer.model")
    last = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])
    windows = [i * held_out.epoch_samples // 13 for i in range(13)]
    loss, bits = plain_bits(model, tokenizer, held_out, windows)
    assert last["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_tool_evaluates_all_windows_beside_its_baselines(tool, undisturbed, held_out):
    said = tool("evaluate.py", undisturbed, "--precision", "fp32").stdout
    result = json.loads((undisturbed / "evaluation.json").read_text())
    model, tokenizer = checkpoint.load_model(undisturbed), Tokenizer(undisturbed / "tokenizer.model")
    loss, bits = plain_bits(model, tokenizer, held_out, range(held_out.epoch_samples))
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    ids = np.concatenate(list(tool_module.parts(held_out)))
    text = tokenizer.decode(ids.tolist()).encode()
    assert result["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert result["xz_bits_per_byte"] < result["gzip_bits_per_byte"] < 8
    for key in ("val", "unigram", "gzip", "xz"):
        assert f"{result[key + '_bits_per_byte']:.3f}" in said
    assert result["step"] == 24 and result["text_bytes"] == len(text)
    assert f"{result['val_bits_per_byte']:.3f} bits per byte on held-out text" in tool("report.py", undisturbed).stdout
    assert "Evaluation on all held-out text" in (undisturbed / "report.html").read_text()


def test_unigram_bits_are_the_entropy_of_known_frequencies():
    training = np.array([1, 3])  # with one added to each count: 2/6 and 4/6
    expected = -math.log2(2 / 6) - math.log2(4 / 6)
    assert tool_module.unigram_bits(training, np.array([0, 1])) == pytest.approx(expected)


def test_without_validation_data_the_tool_asks_for_it(tool, train):
    train(1, "run.name=blind", "data.val=null", "train.steps=1")
    done = tool("evaluate.py", train.root / "blind", check=False)
    assert done.returncode == 2 and "--data" in done.stderr
    assert dist.from_environment() == dist.ALONE
