"""Rows that cannot be used, of every task: named with their places, or left out as if they had never been there."""

import dataclasses
import time

import numpy as np
import pytest

from pretrain.examples.tables import Table
from pretrain.tasks.task import read_rows
from tests.task_helpers import byte_level, make, table_of, word_pieces

ANSWER = {"text": ["red"], "answer_start": [0]}
CASES = {  # task: (overrides, good rows, bad rows, each with what is said of it)
    "classification": (
        [],
        [{"text": "red cat", "label": "a"}, {"text": "cat", "label": 1}],
        [({"text": "red", "label": None}, "column 'label' (task.label) is null"),
         ({"text": "red"}, "column 'label' (task.label) is missing"),
         ({"text": "red", "label": ["a"]}, "label=['a'] must be one label"),
         ({"text": "red", "label": {"a": 1}}, "label={'a': 1} must be one label"),
         ({"text": "red", "label": " "}, "label=' ' must be one label"),
         ({"text": None, "label": "only here"}, "column 'text' (task.text) is null"),
         ({"label": "a"}, "column 'text' (task.text) is missing"),
         ({"text": 5, "label": "a"}, "column 'text' holds 5, not text")],
    ),
    "classification, several labels": (
        ["task.multi_label=true"],
        [{"text": "red cat", "label": ["a", "b"]}, {"text": "cat", "label": []}],
        [({"text": "red", "label": "a"}, "label='a' must be a list of labels"),
         ({"text": "red", "label": None}, "column 'label' (task.label) is null"),
         ({"text": "red", "label": ["a", None]}, "label=['a', None] must be a list of labels")],
    ),
    "classification, pairs": (
        ["task.text_pair=other"],
        [{"text": "red", "other": "cat", "label": "a"}, {"text": "red", "other": "red", "label": "b"}],
        [({"text": "red", "other": None, "label": "a"}, "column 'other' (task.text_pair) is null")],
    ),
    "token_classification": (
        [],
        [{"tokens": ["red", "cat"], "tags": ["O", "B-X"]}],
        [({"tokens": ["red"], "tags": None}, "column 'tags' (task.tags) is null"),
         ({"tags": ["O"]}, "column 'tokens' (task.tokens) is missing"),
         ({"tokens": ["red"], "tags": [1]}, "tags=[1] must be a list of texts"),
         ({"tokens": 3, "tags": ["O"]}, "tokens=3 must be a list of texts"),
         ({"tokens": ["red"], "tags": ["NOUN"]}, "tags: 'NOUN' is no tag of BIO: write B-NOUN"),
         ({"tokens": ["red"], "tags": ["B-Y", "I-Y"]}, "1 words (tokens) and 2 tags (tags)")],
    ),
    "extractive_qa": (
        ["task.stride=4"],
        [{"question": "cat", "context": "red cat", "answers": ANSWER}],
        [({"question": "cat", "context": "red", "answers": None}, "column 'answers' (task.answers) is null"),
         ({"question": "cat", "context": "red"}, "column 'answers' (task.answers) is missing"),
         ({"question": "cat", "context": "red", "answers": "red"}, "column 'answers' (task.answers): answers must be"),
         ({"question": "cat", "context": "red", "answers": {"text": []}}, "answers must be {"),
         ({"question": None, "context": "red", "answers": []}, "column 'question' (task.question) is null"),
         ({"question": "cat", "context": 7, "answers": ANSWER}, "column 'context' holds 7, not text")],
    ),
    "embedding": (
        [],
        [{"query": "red", "document": "red cat"}],
        [({"query": None, "document": "red"}, "column 'query' (task.query) is null"),
         ({"query": "red"}, "column 'document' (task.document) is missing"),
         ({"query": "red", "document": ["red"]}, "column 'document' holds [\"red\"], not text")],
    ),
    "instruct": (
        ["model.causal=true"],
        [{"prompt": "red", "response": "cat"}],
        [({"prompt": "red", "response": None}, "column 'response' (task.response) is null"),
         ({"response": "cat"}, "column 'prompt' (task.prompt) is missing"),
         ({"prompt": 5, "response": "cat"}, "column 'prompt' holds 5, not text")],
    ),
    "instruct, conversations": (
        ["model.causal=true", "train.seq_len=128"],
        [{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]}],
        [({"messages": None}, "column 'messages' (task.messages) is null"),
         ({"messages": "red"}, "the conversation has no messages"),
         ({"messages": [{"role": "user", "content": None}]}, "the conversation, message 1: the content is empty")],
    ),
    "language_model": (
        ["model.causal=true"],
        [{"text": "red cat"}, {"text": ""}, {"text": "cat"}],
        [({"text": None}, "column 'text' (task.text) is null"), ({"text": ["red"]}, "not text")],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return word_pieces(tmp_path_factory.mktemp("words") / "words", ["red", "cat"])


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("letters") / "letters")


@pytest.fixture(params=CASES)
def case(request, words, letters, tmp_path):
    """(function of overrides and a training table -> task, a table with bad rows, that without, what is said)"""
    overrides, good, bad = CASES[request.param]
    name = request.param.partition(",")[0]
    mixed = [*good, *(row for row, _ in bad)]
    mixed = [mixed[number] for number in np.random.default_rng(0).permutation(len(mixed))]
    said = [next((reason for row, reason in bad if row is each), None) for each in mixed]
    assert None in said

    def task_of(table: Table, *more: str):
        tokenizer = letters if name == "instruct" else words
        return make(name, tokenizer, "model.causal=false", *overrides, *more, table=table)

    clean = [row for row, reason in zip(mixed, said, strict=True) if reason is None]
    return task_of, table_of(tmp_path, *mixed), table_of(tmp_path, *clean, name="clean.jsonl"), said


def test_they_are_left_out_as_if_they_had_never_been_there(case):
    task_of, table, clean, said = case
    task, expected = task_of(table, "task.drop_bad=true"), task_of(clean)
    assert dataclasses.replace(task.config, drop_bad=False) == expected.config, "also in the labels that there are"
    examples, without = task.encode(table), expected.encode(clean)
    assert examples.fingerprint == without.fingerprint
    good = [row for row, reason in enumerate(said) if reason is None]
    assert examples.rows.tolist() == [good[row] for row in without.rows]
    places = [(f"{table.place(row)}: ", reason) for row, reason in enumerate(said) if reason]
    for dropped, (place, reason) in zip(examples.dropped, places, strict=True):
        assert dropped.startswith(place) and reason in dropped


def test_they_are_all_named_where_none_may_be_left_out(case):
    task_of, table, clean, said = case
    with pytest.raises(ValueError) as caught:
        task_of(table).encode(table)
    with pytest.raises(ValueError) as again:
        task_of(clean).encode(table)
    bad = [(table.place(row), reason) for row, reason in enumerate(said) if reason]
    for error in (caught, again):
        assert f"{len(bad)} examples of {table.location} cannot be learnt from: " in str(error.value)
        assert all(place in str(error.value) for place, _ in bad[:5]) and "task.drop_bad=true" in str(error.value)


def test_a_column_that_is_missing_is_said_at_once(words, tmp_path):
    table = table_of(tmp_path, {"text": "red", "label": "a"}, {"text": "cat", "label": "b"})
    with pytest.raises(ValueError, match=r"rows.jsonl has no column 'lable' \(did you mean 'label'\?\)"):
        make("classification", words, "task.label=lable", "task.drop_bad=true", table=table)
    with pytest.raises(ValueError, match=r"rows.jsonl has no column 'txt' \(did you mean 'text'\?\)"):
        make("language_model", words, "task.text=txt", "task.drop_bad=true").encode(table)


def test_none_left_is_an_error(words, tmp_path):
    table = table_of(tmp_path, {"text": None, "label": "a"}, {"text": 1, "label": "b"})
    with pytest.raises(ValueError, match="rows.jsonl has no example left of 2 rows"):
        make("classification", words, "task.drop_bad=true", table=table)


def test_every_row_is_to_be_predicted(words, tmp_path):
    """Nothing is left out then; what is to be predicted may be missing."""
    task = make("classification", words, "task.labels=[a,b]", "task.drop_bad=true")
    assert task.encode(table_of(tmp_path, {"text": "red"}), with_gold=False).rows.tolist() == [0]
    table = table_of(tmp_path, {"text": "red"}, {"text": None}, {"text": 5})
    with pytest.raises(ValueError) as caught:
        task.encode(table, with_gold=False)
    assert str(caught.value).startswith(f"2 examples of {table.location} cannot be read: {table.place(1)}: column")
    assert "drop_bad" not in str(caught.value)


@pytest.mark.parametrize("rank, shows", [("0", True), ("1", False)])
def test_one_rank_alone_shows_how_far_it_is(tmp_path, monkeypatch, capfd, rank, shows):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    read_rows(table_of(tmp_path, {}, {}), lambda row: time.sleep(1.2 * (1 - row)), drop_bad=False)
    assert ("reading examples" in capfd.readouterr().err) is shows
