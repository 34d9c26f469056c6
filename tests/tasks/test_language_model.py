"""Further pretraining on texts: windows and targets to the token, masks as in pretraining, bits per byte by hand."""

import math

import numpy as np
import pytest
import torch

from pretrain.examples.stream import ExampleStream
from pretrain.stream.objectives import IGNORE, MaskedLM
from pretrain.stream.stream import Rows
from tests.task_helpers import batch_of, byte_level, config_of, judged, make, new_model, sentence_pieces, table_of

TEXTS = ["One text.", "Ein Text, länger als andere Texte 🎉.", "", "一段文字", "a b c " * 9]
MASKED = ("model.causal=false", "objective=masked_lm", "objective.mask_rate=0.3")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("tokenizers")
    return {"bytes": byte_level(root / "bytes"), "pieces": sentence_pieces(root / "pieces", TEXTS[:2] * 9, 300)}


@pytest.fixture
def table(tmp_path):
    return table_of(tmp_path, *({"text": text} for text in TEXTS))


def nats_of(model, tokens) -> float:
    """-log p of every token but the first, of a window."""
    logits = model(torch.tensor([tokens[:-1]]))[0].detach().double().log_softmax(-1)
    return -float(logits.gather(1, torch.tensor(tokens[1:])[:, None]).sum())


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_texts_stand_next_to_each_other_in_windows_that_share_no_target(tokenizers, table, kind):
    tokenizer = tokenizers[kind]
    whole, of_row = [], []
    for row, text in enumerate(TEXTS):
        document = [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]
        whole, of_row = whole + document, of_row + [row] * len(document)
    task = make("language_model", tokenizer, "train.seq_len=16")
    examples = task.encode(table)
    starts = list(range(0, len(whole) - 1, 16))
    assert len(starts) > 4 and (len(whole) - 1) % 16, "several windows, and a short one at the end"
    assert [examples.columns["inputs"][i].tolist() for i in range(len(examples))] == [whole[s : s + 17] for s in starts]
    assert examples.rows.tolist() == [of_row[start] for start in starts]
    assert examples.lengths.sum() == len(whole) - 1
    batch = batch_of(task, examples)
    assert set(batch) == {"inputs", "labels"} and batch["inputs"].shape == (len(starts), 16)
    targets = [label for row in batch["labels"].tolist() for label in row if label != IGNORE]
    assert targets == whole[1:]
    last = (len(whole) - 1) % 16
    assert batch["labels"][-1].tolist() == whole[starts[-1] + 1 :] + [IGNORE] * (16 - last)
    assert batch["inputs"][-1].tolist() == whole[starts[-1] :] + [0] * (15 - last)


def test_bits_per_byte_are_those_of_a_plain_computation(tokenizers, table):
    tokenizer = tokenizers["pieces"]
    task = make("language_model", tokenizer, "train.seq_len=16", "objective.z_loss=0.1")
    assert task.best == "val_bits_per_byte" and task.figures == ("accuracy", "bits_per_byte")
    examples, model = task.encode(table), new_model(task, 5)
    windows = [examples.columns["inputs"][i].tolist() for i in range(len(examples))]
    nats, targets = sum(nats_of(model, tokens) for tokens in windows), sum(len(tokens) - 1 for tokens in windows)
    hits = sum(int((model(torch.tensor([w[:-1]]))[0].argmax(-1) == torch.tensor(w[1:])).sum()) for w in windows)
    text_bytes = len("".join(TEXTS).encode())  # the special tokens have none, the first of which is no target
    for micro_batch_size in (1, 3, 100):
        figures, validation = judged(task, table, model, micro_batch_size)
        assert figures == pytest.approx({
            "val_loss": nats / targets, "val_accuracy": hits / targets,
            "val_bits_per_byte": nats / math.log(2) / text_bytes,
        }, rel=1e-5)  # fmt: skip
        assert validation.details == []


def test_the_training_loss_has_the_z_loss(tokenizers, table):
    tokenizer = tokenizers["bytes"]
    losses = []
    for weight in (0.0, 0.01):
        task = make("language_model", tokenizer, f"objective.z_loss={weight}")
        batch = batch_of(task, task.encode(table))
        losses.append(float(task.loss_rows(new_model(task, 5), **batch).detach().sum()))
    at = batch["labels"] != IGNORE
    normalisers = new_model(task, 5)(batch["inputs"]).detach()[at].logsumexp(-1)
    assert losses[1] - losses[0] == pytest.approx(float(0.01 * normalisers.square().sum()), rel=1e-3)


def test_a_masked_model_is_asked_what_pretraining_asks(tokenizers, table):
    tokenizer = tokenizers["pieces"]
    task = make("language_model", tokenizer, "train.seq_len=16", *MASKED)
    assert task.best == "val_loss" and task.figures == ("accuracy",)
    examples = task.encode(table)
    assert [len(examples.columns["inputs"][i]) for i in (0, -1)] == [17, int(examples.lengths[-1]) + 1]
    stream = ExampleStream(examples, seed=0, global_batch_size=len(examples))
    batches = [task.collate(stream.rows(stream.numbers(step))) for step in (0, 1)]
    for batch, step in zip(batches, (0, 1), strict=True):
        numbers, rows = stream.numbers(step), stream.rows(stream.numbers(step)).numbers
        tokens = examples.columns["inputs"].padded(rows, 0)
        is_target = np.arange(1, 17) < examples.columns["inputs"].lengths[rows, None]
        objective = MaskedLM(config_of("language_model", *MASKED).objective, tokenizer, 0)
        inputs, labels = objective(Rows(numbers, tokens, is_target))
        assert (batch["inputs"] == inputs).all() and (batch["labels"] == labels).all()
        real = np.minimum(examples.columns["inputs"].lengths[rows], 16)  # what is read, and the end of all
        assert ((batch["documents"] == -1).sum(1) == 16 - real).all() and real.min() < 16
        assert (labels[batch["documents"] == -1] == IGNORE).all() and 0.1 < (labels != IGNORE).mean() < 0.5
    assert (batches[0]["labels"] != batches[1]["labels"]).any(), "the second epoch has other masks"
    model = new_model(task, 5)
    batch = batch_of(task, examples)
    at, logits = batch["labels"] != IGNORE, model(batch["inputs"], documents=batch["documents"]).detach().double()
    expected = {"val_loss": float(torch.nn.functional.cross_entropy(logits[at], batch["labels"][at])),
                "val_accuracy": float((logits.argmax(-1) == batch["labels"])[at].double().mean())}  # fmt: skip
    figures, _ = judged(task, table, model, 3)
    assert figures == pytest.approx(expected, rel=1e-5)


def test_each_text_is_told_by_itself(tokenizers, table):
    """The empty text has no token to predict where nothing stands before a text."""
    for kind in ("bytes", "pieces"):
        tokenizer = tokenizers[kind]
        task = make("language_model", tokenizer, "train.seq_len=16")
        model = new_model(task, 5)
        examples = task.encode(table, with_gold=False)
        told = task.outputs(table, examples, task.score_rows(model, **batch_of(task, examples))[:, 2:].detach().numpy())
        assert len(told) == len(TEXTS)
        for text, row in zip(TEXTS, told, strict=True):
            ids = [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]
            if len(ids) == 1:
                assert row == {"loss": None, "accuracy": None, "bits_per_byte": None}
                continue
            nats = sum(nats_of(model, ids[start : start + 17]) for start in range(0, len(ids) - 1, 16))
            assert row["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
            if text and tokenizer.prefix:
                assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_what_cannot_be_learnt_is_refused(tokenizers, tmp_path):
    with pytest.raises(ValueError, match="objective=causal_lm does not fit a model that looks ahead"):
        make("language_model", tokenizers["pieces"], "model.causal=false")
    with pytest.raises(ValueError, match="objective=masked_lm does not fit a model that looks back only"):
        make("language_model", tokenizers["pieces"], "objective=masked_lm")
    with pytest.raises(ValueError, match="has no mask token"):
        make("language_model", tokenizers["bytes"], *MASKED)
    with pytest.raises(ValueError, match="rows.jsonl has no text of more than one token"):
        make("language_model", tokenizers["bytes"]).encode(table_of(tmp_path, {"text": ""}))
    with pytest.raises(ValueError, match=r"line 2: column 'text' holds 5, not text"):
        make("language_model", tokenizers["bytes"]).encode(table_of(tmp_path, {"text": "a"}, {"text": 5}))
