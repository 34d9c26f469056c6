"""Tags of words: which token has which tag, the way back, what is cut or refused."""

import numpy as np
import pytest
import torch

from tests.task_helpers import batch_of, byte_level, judged, make, sentence_pieces, table_of, taught, word_pieces

WORDS = [f"w{i}" for i in range(20)] + ["an", "##na", "##s", "of", "par", "##is", ",", "in"]
CLS, SEP, NONE = 2, 3, -100
NAMES = "task.labels=[O,B-LOC,B-PER,I-LOC,I-PER]"
ENCODER = "model.causal=false"
HARD = [
    (["anna", ",", "of", "paris", "in", "paris"], ["B-PER", "O", "O", "B-LOC", "O", "B-LOC"]),
    (["鲁迅", "在", "北京", "。"], ["B-PER", "O", "B-LOC", "O"]),
    (["👩\u200d👩\u200d👧", "e\u0301te\u0301", "🎉", "New York", "x"], ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]),
    (["a"], ["B-PER"]),
    (["(", "U.S.A.", ")", "don't", "3.14", "<s>"], ["O", "B-LOC", "O", "O", "O", "I-PER"]),
]


def row(words: list[str], tags: list[str] | None = None) -> dict:
    return {"tokens": words, "tags": ["O"] * len(words) if tags is None else tags}


def task_of(tokenizer, *overrides: str, table=None):
    return make("token_classification", tokenizer, NAMES, *overrides, table=table)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("tokenizers")
    texts = [" ".join(words) for words, _ in HARD[:1] + HARD[3:]] * 20
    return {"words": word_pieces(root / "words", WORDS), "bytes": byte_level(root / "bytes"),
            "pieces": sentence_pieces(root / "pieces", texts, 300)}  # fmt: skip


@pytest.fixture
def bert(tokenizers):
    return task_of(tokenizers["words"], ENCODER)


def said(task, examples, *rows: int) -> np.ndarray:
    """The predictions of a model that is sure of the labels, and of the tag 4 wherever there is none."""
    batch = batch_of(task, examples, *rows)
    labels = batch.pop("labels")
    logits = 30.0 * torch.nn.functional.one_hot(labels.where(labels >= 0, 4), len(task.labels)).float()
    found = task.score_rows(lambda inputs, **others: logits, labels, **batch).numpy()
    assert found[:, 0].max() < 1e-6 and (found[:, 1] == (labels >= 0).sum(1).numpy()).all()
    assert found.shape[1] == 2 + task.seq_len
    return found[:, 2:]


def test_the_first_token_of_a_word_has_its_tag(tokenizers, bert, tmp_path):
    table = table_of(tmp_path, row(*HARD[0]), row(["w1"]))
    examples = bert.encode(table)
    ids = [CLS, *tokenizers["words"].encode("an na , of par is in paris"), SEP]
    assert ids[2] == 1, "as a word of its own, na is unknown"
    text = tokenizers["words"].encode("anna , of paris in paris")
    assert examples.columns["inputs"][0].tolist() == [CLS, *text, SEP] and len(text) == 9
    labels = examples.columns["labels"]
    assert labels[0].tolist() == [NONE, 2, NONE, 0, 0, 1, NONE, 0, 1, NONE, NONE]
    assert labels[1].tolist() == [NONE, 0, NONE]
    batch = batch_of(bert, examples)
    assert (
        batch["labels"][1].tolist() == [NONE, 0] + [NONE] * 9 and batch["documents"][1].tolist() == [0] * 3 + [-1] * 8
    )
    assert sorted(batch) == ["documents", "inputs", "labels"]


def test_in_a_model_that_looks_back_the_last_one_has(tokenizers, tmp_path):
    examples = task_of(tokenizers["words"]).encode(table_of(tmp_path, row(*HARD[0])))
    assert examples.columns["labels"][0].tolist() == [NONE, NONE, 2, 0, 0, NONE, 1, 0, NONE, 1]


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
@pytest.mark.parametrize("looks", ["model.causal=true", ENCODER])
def test_from_labels_back_to_tags(tokenizers, kind, looks, tmp_path):
    """The ids are those of the words with spaces between; each word has one token, inside of it."""
    tokenizer, table = tokenizers[kind], table_of(tmp_path, *(row(*one) for one in HARD))
    task = task_of(tokenizer, looks, "train.seq_len=96", table=table)
    examples = task.encode(table)
    after = [] if task.model.causal else tokenizer.suffix
    for number, (words, _) in enumerate(HARD):
        ids, spans = tokenizer.encode_spans(" ".join(words))
        assert examples.columns["inputs"][number].tolist() == [*tokenizer.prefix, *ids.tolist(), *after]
        places = examples.facts["places"][number] - len(tokenizer.prefix)
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        for place, word, end in zip(places.tolist(), words, ends.tolist(), strict=True):
            others = [i for i, (a, b) in enumerate(spans.tolist()) if a < end and b > end - len(word)]
            assert place == (others[-1] if task.model.causal else others[0])
    told = task.outputs(table, examples, said(task, examples))
    assert told == [{"tags": tags} for _, tags in HARD]
    figures, details, facts = task.score(table, examples, said(task, examples))
    assert figures == {"span_f1": 1.0, "span_precision": 1.0, "span_recall": 1.0} and facts == {}
    assert details[0] == {
        "text": "anna , of paris in paris",
        "gold": HARD[0][1],
        "prediction": HARD[0][1],
        "right": True,
    }


def test_the_tags_of_a_table(tokenizers, tmp_path):
    table = table_of(tmp_path, row(["a", "b"], ["B-PER", "B-LOC"]), row(["a"], ["I-PER"]))
    task = make("token_classification", tokenizers["words"], table=table)
    assert task.labels == ["O", "B-LOC", "B-PER", "I-PER"] and task.described()["labels"] == task.labels
    assert (task.head, task.best) == ("tokens", "val_span_f1")
    plain = table_of(tmp_path, row(["a", "b"]), name="plain.jsonl")
    with pytest.raises(ValueError, match="plain.jsonl has only the tag O"):
        make("token_classification", tokenizers["words"], table=plain)
    nouns = table_of(tmp_path, row(["a", "b"], ["DET", "O"]), name="nouns.jsonl")
    bioes = table_of(tmp_path, row(["a", "b"], ["O", "E-PER"]), name="bioes.jsonl")
    with pytest.raises(ValueError, match="tags: 'E-PER' is of BIOES or BILOU, and BIO is read: write B- for S- and U-"):
        make("token_classification", tokenizers["words"], table=bioes)
    with pytest.raises(
        ValueError, match="tags: 'DET' is no tag of BIO: write B-DET for the first word of a span, I-DET"
    ):
        make("token_classification", tokenizers["words"], table=nouns)


def test_what_is_cut_is_outside(tokenizers, tmp_path):
    """Six places: [CLS] an ##na , of [SEP]."""
    table = table_of(tmp_path, row(*HARD[0]), row(["w1", "w2", "w3", "paris"], ["O", "O", "O", "B-LOC"]))
    task = task_of(tokenizers["words"], ENCODER, "train.seq_len=6")
    examples = task.encode(table)
    assert examples.columns["labels"][0].tolist() == [NONE, 2, NONE, 0, 0, NONE]
    assert examples.columns["labels"][1].tolist() == [NONE, 0, 0, 0, 1, NONE]
    told = task.outputs(table, examples, said(task, examples))
    assert [one["tags"] for one in told] == [["B-PER", "O", "O", "O", "O", "O"], ["O", "O", "O", "B-LOC"]]
    figures, details, _ = task.score(table, examples, said(task, examples))
    assert figures == {"span_f1": 2 * 2 / (4 + 2), "span_precision": 1.0, "span_recall": 0.5}
    assert [one["right"] for one in details] == [False, True]
    half = task_of(tokenizers["words"], "train.seq_len=6").encode(table)  # [CLS] an ##na , of par|is
    assert half.columns["labels"][0].tolist() == [NONE, NONE, 2, 0, 0, NONE]


def test_words_without_a_token_are_outside(bert, tmp_path):
    table = table_of(tmp_path, row(["w1", "\x01", "", "paris"], ["B-PER", "I-PER", "I-PER", "B-LOC"]))
    examples = bert.encode(table)
    assert examples.facts["places"][0].tolist() == [1, -1, -1, 2]
    assert bert.outputs(table, examples, said(bert, examples)) == [{"tags": ["B-PER", "O", "O", "B-LOC"]}]


def test_spans_are_counted_as_conll_does(bert, tmp_path):
    table = table_of(tmp_path, row(["w1", "w2", "w3"], ["B-PER", "I-PER", "O"]), row(["w4"], ["B-LOC"]))
    examples = bert.encode(table)
    predictions = said(bert, examples)
    predictions[0, 2] = bert.numbers["O"]  # the span is too short, the other one is right
    figures, details, _ = bert.score(table, examples, predictions)
    assert figures == {"span_f1": 0.5, "span_precision": 0.5, "span_recall": 0.5}
    assert [one["right"] for one in details] == [False, True] and details[0]["prediction"] == ["B-PER", "O", "O"]


@pytest.mark.parametrize("bad, message", [
    (row(["w1", "w2"], ["O"]), "line 2: 2 words (tokens) and 1 tags (tags)"),
    (row(["w1"], ["B-ORG"]), "line 2: the tag 'B-ORG' is none of O, B-LOC, B-PER, I-LOC, I-PER"),
    (row([], []), "line 2: it has no words"),
])  # fmt: skip
def test_what_cannot_be_learnt_is_named_or_left_out(tokenizers, bert, tmp_path, bad, message):
    table = table_of(tmp_path, row(*HARD[0]), bad, row(["w1"]))
    with pytest.raises(ValueError, match="1 examples of .*rows.jsonl cannot be learnt from") as caught:
        bert.encode(table)
    assert message in str(caught.value)
    lenient = task_of(tokenizers["words"], ENCODER, "task.drop_bad=true")
    examples = lenient.encode(table)
    assert examples.rows.tolist() == [0, 2] and message in examples.dropped[0]
    figures, details, _ = lenient.score(table, examples, said(lenient, examples))
    assert figures["span_f1"] == 1.0 and [one["text"] for one in details] == ["anna , of paris in paris", "w1"]


@pytest.mark.parametrize("bad", [row(["w1", 2]), row(["w1"], [0]), {"tokens": 5, "tags": ["O"]}])
def test_columns_of_other_things_are_refused(bert, tmp_path, bad):
    table = table_of(tmp_path, row(["w1"]), bad)
    with pytest.raises(
        ValueError, match=r"line 2: t\w+=.* must be a list of texts, or one text that spaces divide \(task.t"
    ):
        bert.encode(table)


def test_a_text_is_words_with_spaces_between(bert, tmp_path):
    spaced = table_of(tmp_path, {"tokens": "  anna ,\tof paris\n", "tags": "B-PER O O B-LOC"})
    listed = table_of(tmp_path, row(["anna", ",", "of", "paris"], ["B-PER", "O", "O", "B-LOC"]), name="listed.jsonl")
    assert bert.encode(spaced).fingerprint == bert.encode(listed).fingerprint


def test_without_gold_every_row_gives_tags(tokenizers, tmp_path):
    table = table_of(tmp_path, *({"tokens": text} for text in ("anna , in paris", "", ["w1"])))
    for looks in (ENCODER, "model.causal=true"):
        for kind in ("words", "bytes"):
            task = task_of(tokenizers[kind], looks)
            examples = task.encode(table, with_gold=False)
            batch = batch_of(task, examples)
            assert (batch["labels"] == NONE).all()
            rows = task.score_rows(lambda inputs, **others: torch.zeros(*inputs.shape, 5), **batch).numpy()
            assert (rows[:, :2] == 0).all()
            assert task.outputs(table, examples, rows[:, 2:]) == [{"tags": ["O"] * n} for n in (4, 0, 1)]


def test_a_model_learns_which_words_are_spans(tokenizers, tmp_path):
    """Words with an even number are places; one that follows another is inside of the same span."""
    rows = []
    for picked in np.random.default_rng(0).integers(0, 20, (96, 8)).tolist():
        inside = [number % 2 == 0 for number in picked]
        before = [False, *inside[:-1]]
        tags = [
            "O" if not is_in else "I-LOC" if goes_on else "B-LOC" for is_in, goes_on in zip(inside, before, strict=True)
        ]
        rows.append(row([f"w{number}" for number in picked], tags))
    table, held_out = table_of(tmp_path, *rows[:64]), table_of(tmp_path, *rows[64:], name="held_out.jsonl")
    task = make("token_classification", tokenizers["words"], ENCODER, table=table)
    figures, validation = judged(task, held_out, taught(task, table, steps=90))
    assert figures["val_span_f1"] > 0.9 and figures["val_loss"] < 0.3, figures
    assert len(validation.details) == 32
