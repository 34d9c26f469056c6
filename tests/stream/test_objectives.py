"""Objectives: what is masked and how often, and that nothing but the seed and the sample number decides it."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.config import compose
from pretrain.config.schema import ObjectiveConfig
from pretrain.shards.manifest import Manifest
from pretrain.stream.mixture import Phase
from pretrain.stream.objectives import IGNORE, MaskedLM, batch_of, is_padding, make_objective
from pretrain.stream.order import hash_key, hash_keys, splitmix64, splitmix64_at
from pretrain.stream.source import StreamOptions
from pretrain.stream.stream import Rows, Stream
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.data_helpers import python_like_text, random_documents, write_dataset
from tests.models import filled_model

MASKED = ObjectiveConfig("masked_lm", 0.15, False, 0.0)
SEQ_LEN, BATCH, VOCAB = 32, 24, 500


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real one, of as many ids as the data sets here have."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train(python_like_text(3000).split("\n\n"), VOCAB))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("objectives") / "data", random_documents(120, 400))


def stream_of(dataset, rank=0, world_size=1, **options) -> Stream:
    return Stream([dataset], [Phase(0, SEQ_LEN, BATCH, (1.0,))], 5, rank, world_size, StreamOptions(**options))


def batches(stream: Stream, objective, start: int, count: int) -> list[tuple]:
    reader = stream.batches(start)
    found = [objective(rows) for rows in itertools.islice(reader, count)]
    reader.close()
    return found


def random_rows(count: int, length: int, first: int = 0) -> Rows:
    tokens = np.random.default_rng(first).integers(7, VOCAB, (count, length + 1), dtype=np.uint16)
    return Rows(np.arange(first, first + count), tokens, np.ones((count, length), dtype=bool))


def assert_share(found: float, expected: float, trials: int):
    """Within 4 standard deviations of a share of independent trials."""
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / trials) ** 0.5)


def test_causal_lm(tokenizer):
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 0]], dtype=np.uint32)
    is_target = np.array([[True, True, True], [True, True, False]])
    causal_lm = make_objective(replace(MASKED, name="causal_lm"), tokenizer, 0)
    inputs, labels = causal_lm(Rows(np.array([0, 1]), tokens, is_target))
    assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]] and inputs.dtype == labels.dtype == np.int64
    assert labels.tolist() == [[2, 3, 4], [6, 7, IGNORE]]
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]


# --- masked_lm ---


def test_numbers_of_many_keys_and_places_are_those_of_one():
    keys = hash_keys(hash_key(7, 5), np.array([0, 3, 1 << 40]))
    assert keys.tolist() == [hash_key(7, 5, number) for number in (0, 3, 1 << 40)]
    found = splitmix64_at(keys[:, None], np.arange(9, dtype=np.uint64))
    assert found.tolist() == [splitmix64(key, 9).tolist() for key in keys.tolist()]


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.9])
def test_the_rate_and_what_becomes_of_the_chosen(tokenizer, rate):
    rows = random_rows(400, 512)
    inputs, labels = make_objective(replace(MASKED, mask_rate=rate), tokenizer, 0)(rows)
    tokens, chosen = rows.tokens[:, :-1].astype(np.int64), labels != IGNORE
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    assert inputs.dtype == labels.dtype == np.int64
    assert_share(chosen.mean(), rate, chosen.size)
    for axis in (0, 1):  # in each row and at each place alike
        means = chosen.mean(axis)
        assert means.std() == pytest.approx((rate * (1 - rate) / chosen.shape[axis]) ** 0.5, rel=0.15)
    both = chosen[:, 1:] & chosen[:, :-1]
    assert both.mean() == pytest.approx(rate**2, abs=4 * (rate**2 / both.size) ** 0.5 * 2)
    count, ordinary = int(chosen.sum()), VOCAB - 7
    masked, stays = (inputs == tokenizer.mask) & chosen, (inputs == tokens) & chosen
    others = inputs[chosen & ~masked & ~stays]
    assert_share(masked.sum() / count, 0.8, count)
    assert_share(stays.sum() / count, 0.1 + 0.1 / ordinary, count)
    assert_share(len(others) / count, 0.1 * (1 - 1 / ordinary), count)
    drawn = np.bincount(others, minlength=VOCAB)
    assert not drawn[list(tokenizer.special_ids.values())].any() and drawn[7] and drawn[VOCAB - 1]
    expected = len(others) / ordinary
    spread = ((drawn[7:] - expected) ** 2 / expected).sum()  # chi square
    assert abs(spread - (ordinary - 1)) < 4 * (2 * (ordinary - 1)) ** 0.5
    assert (rows.tokens == random_rows(400, 512).tokens).all(), "the rows are left as they are"


def test_masks_are_those_of_the_definition(tokenizer):
    """Number by number: a change of it would change what a run that goes on sees."""
    rows, limit = random_rows(3, 50, first=11), int(0.15 * 2**64)
    inputs, labels = make_objective(MASKED, tokenizer, 3)(rows)
    chosen = 0
    for row, number in enumerate(rows.sample_numbers.tolist()):
        draws = [splitmix64(hash_key(3, use, number), 50).tolist() for use in (5, 6, 7)]
        for place, token in enumerate(rows.tokens[row, :-1].tolist()):
            choose, how, other = (draw[place] for draw in draws)
            expected = token
            if choose < limit:
                expected = 4 if how < 0.8 * 2**64 else 7 + other % (VOCAB - 7) if how < 0.9 * 2**64 else token
            assert inputs[row, place] == expected and labels[row, place] == (token if choose < limit else IGNORE)
            chosen += choose < limit
    assert chosen > 10


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("whole_word", [False, True])
def test_masks_are_the_same_in_every_world(dataset, tokenizer, world_size, whole_word):
    objective = make_objective(replace(MASKED, whole_word=whole_word), tokenizer, 0)
    alone = stream_of(dataset)
    steps = alone.epoch_samples // BATCH + 3  # over the end of an epoch
    ranks = [batches(stream_of(dataset, r, world_size), objective, 0, steps) for r in range(world_size)]
    for step in range(steps):
        expected = objective(alone.rows(np.arange(step * BATCH, (step + 1) * BATCH)))
        for column, whole in enumerate(expected):
            together = np.empty_like(whole)
            for r in range(world_size):
                together[r::world_size] = ranks[r][step][column]
            np.testing.assert_array_equal(together, whole)


def test_masks_survive_a_resume_and_do_not_depend_on_what_is_read_at_once(dataset, tokenizer):
    whole = batches(stream_of(dataset, 1, 2), make_objective(MASKED, tokenizer, 0), 0, 20)
    for start, prefetch in ((1, 1), (7, 3), (19, 8)):
        resumed = stream_of(dataset, 1, 2, prefetch_batches=prefetch)
        found = batches(resumed, make_objective(MASKED, tokenizer, 0), start, 20 - start)
        for mine, expected in zip(found, whole[start:], strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_a_window_is_masked_anew_in_every_epoch_and_with_every_seed(dataset, tokenizer):
    stream = stream_of(dataset, shuffle=False)
    epoch = stream.epoch_samples
    masks = []
    for seed, first in ((0, 0), (0, epoch), (0, 2 * epoch), (1, 0)):
        rows = stream.rows(np.arange(first, first + epoch))
        inputs, labels = make_objective(MASKED, tokenizer, seed)(rows)
        masks.append((labels != IGNORE, inputs, rows.tokens))
    for (a, inputs_a, tokens_a), (b, inputs_b, tokens_b) in itertools.combinations(masks, 2):
        np.testing.assert_array_equal(tokens_a, tokens_b)
        assert (a & b).mean() == pytest.approx(0.0225, abs=0.006), "as if the other had not been"
        assert (inputs_a != inputs_b).mean() > 0.2


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("has_pad", [True, False])
def test_special_tokens_and_padding_are_never_chosen(tmp_path, dataset, tokenizer, documents, has_pad):
    stream = stream_of(dataset, packing="best_fit", documents=documents, cache_folder=tmp_path)
    if not has_pad:  # as a tokenizer whose padding is an ordinary token, 3
        tokenizer = copy.copy(tokenizer)
        tokenizer.special_ids = {name: i for name, i in tokenizer.special_ids.items() if name != "pad"}
    known = stream_of(dataset, packing="best_fit", documents=True, cache_folder=tmp_path)
    numbers = np.arange(10 * stream.epoch_samples)
    padding = known.rows(numbers).documents[:, :-1] < 0
    rows = stream.rows(numbers)
    inputs, labels = make_objective(replace(MASKED, mask_rate=0.5), tokenizer, 0)(rows)
    chosen, tokens = labels != IGNORE, rows.tokens[:, :-1]
    np.testing.assert_array_equal(is_padding(rows), padding)
    special = np.isin(tokens, list(tokenizer.special_ids.values()))
    assert padding.sum() > 500 and (special & ~padding).sum() > 500 and (padding == (tokens == 3)).all()
    assert not chosen[special | padding].any()
    np.testing.assert_array_equal(inputs[special | padding], tokens[special | padding])
    allowed = ~special & ~padding
    assert_share(chosen[allowed].mean(), 0.5, int(allowed.sum()))
    assert chosen[:, -1].any(), "the last input too"


def test_a_row_may_hold_nothing_to_choose(tokenizer):
    nothing = Rows(np.array([0]), np.full((1, 9), 3, dtype=np.uint16), np.zeros((1, 8), dtype=bool))
    inputs, labels = make_objective(MASKED, tokenizer, 0)(nothing)
    assert inputs.tolist() == [[3] * 8] and labels.tolist() == [[IGNORE] * 8]
    assert is_padding(nothing).all()


# --- whole words ---


def words_of(tokens: list[int], tokenizer) -> list[list[int]]:
    """The places of each word of a row, one by one."""
    continues, special = tokenizer.continues_word(), set(tokenizer.special_ids.values())
    words, before = [], None
    for place, token in enumerate(tokens):
        if token not in special:
            if words and before not in special and continues[token] and words[-1][-1] == place - 1:
                words[-1].append(place)
            else:
                words.append([place])
        before = token
    return words


def test_words_are_chosen_as_a_whole(tokenizer):
    ids = [i for text in python_like_text(4000).split("\n\n") for i in (1, *tokenizer.encode(text), 2)]
    windows = len(ids) // 65
    tokens = np.array(ids[: windows * 65], dtype=np.uint16).reshape(windows, 65)
    rows = Rows(np.arange(windows), tokens, np.ones((windows, 64), dtype=bool))
    inputs, labels = make_objective(replace(MASKED, whole_word=True), tokenizer, 0)(rows)
    _, single = make_objective(MASKED, tokenizer, 0)(rows)
    words, partly, long, chosen, mixed, cut = 0, 0, 0, 0, 0, 0
    for row in range(windows):
        for word in words_of(tokens[row, :-1].tolist(), tokenizer):
            states = {bool(state) for state in labels[row, word] != IGNORE}
            assert len(states) == 1
            words, chosen, long = words + 1, chosen + (True in states), long + (len(word) > 1)
            partly += len(set(single[row, word] != IGNORE)) > 1
            mixed += True in states and len(set(inputs[row, word] == tokenizer.mask)) > 1
            cut += word[0] == 0 and bool(tokenizer.continues_word()[tokens[row, 0]])
    assert long > 1000 and partly > 100 and mixed > 20 and cut > 50
    assert_share(chosen / words, 0.15, words)
    ordinary = ~np.isin(tokens[:, :-1], list(tokenizer.special_ids.values()))
    assert (labels != IGNORE)[ordinary].mean() == pytest.approx(0.15, abs=0.01)


def test_words_end_where_documents_do(tokenizer):
    """Without bos and eos between them: what is not a target begins another document."""
    inside = int(np.flatnonzero(tokenizer.continues_word())[0])
    tokens = np.full((4000, 9), inside, dtype=np.uint16)
    is_target = np.ones((4000, 8), dtype=bool)
    is_target[:, 3] = False  # between places 3 and 4
    rows = Rows(np.arange(4000), tokens, is_target)
    chosen = make_objective(replace(MASKED, whole_word=True, mask_rate=0.5), tokenizer, 0)(rows)[1] != IGNORE
    for half in (chosen[:, :4], chosen[:, 4:]):
        assert (half == half[:, :1]).all()
    assert_share((chosen[:, 0] != chosen[:, 4]).mean(), 0.5, 4000)


# --- mistakes, and what a model is given ---


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5])
def test_a_rate_that_leaves_nothing_to_do_is_refused(tokenizer, rate):
    with pytest.raises(ValueError, match=r"objective.mask_rate=.* must lie between 0 and 1"):
        make_objective(replace(MASKED, mask_rate=rate), tokenizer, 0)


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    bare = copy.copy(tokenizer)
    bare.mask = None
    with pytest.raises(ValueError, match=r"tokenizer.model has no mask token.* objective=causal_lm"):
        make_objective(MASKED, bare, 0)


def test_a_model_that_looks_ahead_does_not_see_padding(tmp_path, dataset, tokenizer):
    """Without document masks: the padding is hidden, and nothing else."""
    stream = stream_of(dataset, packing="best_fit", cache_folder=tmp_path)
    rows = stream.rows(np.arange(stream.epoch_samples))
    masked, causal = (make_objective(replace(MASKED, name=name), tokenizer, 0) for name in ("masked_lm", "causal_lm"))
    assert list(batch_of(causal, rows)) == ["inputs", "labels"] and isinstance(masked, MaskedLM)
    inputs, labels, documents = batch_of(masked, rows).values()
    np.testing.assert_array_equal(documents, np.where(is_padding(rows), -1, 0))
    windows = stream_of(dataset).rows(np.arange(stream_of(dataset).epoch_samples))
    assert list(batch_of(masked, windows)) == ["inputs", "labels"], "no padding, nothing to hide"
    with_documents = stream_of(dataset, packing="best_fit", documents=True, cache_folder=tmp_path)
    known = with_documents.rows(np.arange(stream.epoch_samples))
    np.testing.assert_array_equal(batch_of(masked, known)["documents"], known.documents[:, :-1])

    cfg = compose.compose("pretrain", ["run.name=x", "model=llama_tiny", f"model.vocab_size={VOCAB}",
                                       "model.causal=false", "objective=masked_lm"]).model  # fmt: skip
    model = filled_model(cfg, 5).eval()
    with torch.no_grad():
        row = int(np.argmax((documents < 0).sum(1)))
        held = int((documents[row] == 0).sum())
        one, its = torch.from_numpy(inputs[row : row + 1]), torch.from_numpy(documents[row : row + 1])
        assert 0 < held < SEQ_LEN - 1
        alone = model(one[:, :held])
        assert torch.allclose(model(one, documents=its)[:, :held], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(one)[:, :held], alone, rtol=1e-2, atol=1e-2)
