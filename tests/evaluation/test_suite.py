"""The tasks of held-out text: their examples, what is a target of them, and their figures by plain computation."""

import numpy as np
import pytest
import torch

from pretrain.evaluation import suite
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.data_helpers import random_documents, write_dataset
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 97, (10, 16))


def plain_loss(model, tokens: list[int], first: int) -> float:
    """Nats of the tokens from place `first` on."""
    logits = model(torch.tensor([tokens[:-1]]))[0].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return float(losses[first - 1 :].sum())


def score_of(model):
    return lambda tokens, is_target: suite.score_targets(model, tokens, is_target, 4, lambda count: None)


def test_copying_is_the_loss_of_a_text_and_of_its_repetition(model, rows):
    found = suite.copying(score_of(model), rows)
    first = sum(plain_loss(model, row, 1) for row in rows.tolist())
    again = sum(plain_loss(model, row + row, 17) for row in rows.tolist())
    assert found == {
        "items": 10, "first_loss": pytest.approx(first / 150, rel=1e-5),
        "repeat_loss": pytest.approx(again / 150, rel=1e-5),
    }  # fmt: skip


def test_the_right_passage_must_be_likelier_than_each_other(model, rows):
    documents = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5])
    right = 0
    for place, row in enumerate(rows.tolist()):
        ends = [rows[suite.others(documents, choice)[place], 12:].tolist() for choice in range(suite.CHOICES)]
        assert ends[0] == row[12:]
        losses = [plain_loss(model, row[:12] + end, 12) for end in ends]
        right += losses[0] < min(losses[1:])
    found = suite.next_passage(score_of(model), rows, documents)
    assert 0 < right < 10 and found["accuracy"] == right / 10 and found["chance"] == 0.25
    assert found["stderr"] == pytest.approx((right / 10 * (1 - right / 10) / 10) ** 0.5)


def test_a_model_that_cannot_tell_is_right_in_nothing():
    same = np.ones((8, 16), dtype=np.int64)
    found = suite.next_passage(lambda tokens, is_target: np.zeros((len(tokens), 2)), same, np.arange(8))
    assert found["accuracy"] == 0


def test_passages_of_others_are_of_other_documents():
    for documents in ([0] * 9 + [1], [0, 1, 2, 3], [0] * 5 + [1] * 4 + [2] * 3):
        numbers = np.array(documents)
        for choice in range(1, suite.CHOICES):
            assert (numbers[suite.others(numbers, choice)] != numbers).all()


def words_of(tokenizer, text: str) -> str:
    ids = np.array([tokenizer.encode(text)])
    (start,), (end,) = suite.word_bounds(ids, tokenizer)
    return tokenizer.decode(ids[0, start:end].tolist()).strip() if start >= 0 else ""


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the message is parsed again", "is parsed"),  # the last may go on: the one before it is whole
        ("an unusual encyclopedia, ", "encyclopedia"),
        ("return self.policy\n", "policy"),
        ("one two)))", "two"),
        ("...", ""),
    ],
)
def test_the_last_whole_word(shards, text, word):
    found = words_of(load_tokenizer(shards / "train"), text)
    assert found == word.split()[-1] if word else found == ""


def test_in_scripts_without_spaces_each_token_is_a_word(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=letters)
    made.train_from_iterator(["今天 天气 很好", "今天 天气 很好", "a warm day"] * 50, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>", "tokenizer_class": "GPT2TokenizerFast"}')
    tokenizer = load_tokenizer(tmp_path)
    assert words_of(tokenizer, "今天天气很好。") == "好" and words_of(tokenizer, "a warm day.") == "day"


def test_the_last_word_is_right_when_all_its_tokens_are_the_likeliest(shards):
    tokenizer = load_tokenizer(shards / "train")
    row = np.array([tokenizer.encode("def encode(self, the_message, an encyclopedia)")])
    (start,), (end,) = suite.word_bounds(row, tokenizer)
    assert start >= row.shape[1] // 2 and end - start > 1
    for missed in (0, 1):
        asked = []

        def score(tokens, is_target, missed=missed, asked=asked):
            asked.append(np.flatnonzero(is_target[0]).tolist())
            return np.array([[1.0, end - start - missed]])

        assert suite.last_word(score, row, tokenizer)["accuracy"] == 1 - missed
        assert asked == [list(range(start, end))]


def test_examples_are_spread_evenly_and_too_few_documents_are_refused(tmp_path):
    manifest = write_dataset(tmp_path / "many", random_documents(50, longest=200))
    rows, documents = suite.sample(manifest, 16, 20)
    assert rows.shape == (20, 16) and len(np.unique(documents)) > 15 and documents[-1] > 40
    assert (rows == suite.sample(manifest, 16, 20)[0]).all()
    few = write_dataset(tmp_path / "few", random_documents(3, longest=200))
    with pytest.raises(ValueError, match="3 documents of 16 tokens or more"):
        suite.sample(few, 16, 20)


def test_a_bidirectional_model_is_refused(tmp_path):
    manifest = write_dataset(tmp_path, random_documents(50, longest=200))
    with pytest.raises(ValueError, match="bidirectional"):
        suite.run_suite(tiny_model("model.causal=false"), manifest, None, 32, 10)
