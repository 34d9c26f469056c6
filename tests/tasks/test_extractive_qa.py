"""Extractive questions: windows and labels to the token, the way from labels back to answers, what is refused."""

import math
import re

import numpy as np
import pytest
import torch

from tests import task_helpers
from tests.task_helpers import batch_of, byte_level, judged, make, sentence_pieces, table_of, taught, word_pieces

WORDS = [f"w{i}" for i in range(40)] + ["who", "sings", "##s", "cat", "red"]
CLS, SEP = 2, 3
ENCODER = ("model.causal=false", "model.segments=2")
HARD = [  # a question, and a context with its answer in brackets
    ("Where is it?", "It is in Paris, in [Paris] (France)."),
    ("谁写的？", "鲁迅？这本书是[鲁迅]写的，不是老舍写的。"),
    ("Which one 🎉?", "party 🎉👩\u200d👩\u200d👧 and 👍🏽 or [🎉] again"),
    ("e\u0301?", "cafe\u0301  [na\u00efve] \u0300 x  "),
    ("first", "   [leading] spaces\n\tand tabs"),
    ("last", "the end of it is far [away]"),
    ("all", "[whole context]"),
]


def question(context: str, answer: str | None = None, start: int | None = None, text: str = "who sings") -> dict:
    found = [] if answer is None else [answer]
    starts = [] if answer is None else [context.index(answer) if start is None else start]
    return {"question": text, "context": context, "answers": {"text": found, "answer_start": starts}}


def words(start: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(start, end))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("tokenizers")
    texts = [f"{asked}\n{context}\n{words(0, 40)}" for asked, context in HARD[:2] + HARD[4:]] * 5
    made = {"words": word_pieces(root / "words", WORDS), "bytes": byte_level(root / "bytes")}
    return made | {"pieces": sentence_pieces(root / "pieces", texts, 360)}


@pytest.fixture
def bert(tokenizers):
    """A task whose windows have room for 10 tokens beside "who sings", and share 4."""
    return make("extractive_qa", tokenizers["words"], *ENCODER, "train.seq_len=15", "task.stride=4")


def perfect(task, examples) -> np.ndarray:
    """The predictions of a model that is sure of the labels."""
    batch = batch_of(task, examples)
    labels = batch.pop("labels")
    logits = torch.zeros(*batch["inputs"].shape, 2)
    logits.scatter_(1, labels[:, None], 30.0)

    def model(inputs, **others):
        return logits

    rows = task.score_rows(model, labels, **batch).numpy()
    assert rows[:, 0].max() < 1e-9 and (rows[:, 1] == 2).all()
    return rows[:, 2:]


def test_windows_segments_and_labels(tokenizers, bert, tmp_path):
    """24 words: windows of 10 that share 4 begin at words 0, 6 and 12, and the last one at 18 has what is left."""
    table = table_of(tmp_path, question(words(0, 24), "w8 w9"))
    examples = bert.encode(table)
    ask = [CLS, *ids(tokenizers["words"], "who sings"), SEP]
    columns = {name: [column[i].tolist() for i in range(len(column))] for name, column in examples.columns.items()}
    parts = [(0, 10), (6, 16), (12, 22), (18, 24)]
    assert columns["inputs"] == [[*ask, *ids(tokenizers["words"], words(*part)), SEP] for part in parts]
    assert columns["segments"] == [[0] * 4 + [1] * (end - start + 1) for start, end in parts]
    assert columns["context"] == [[4, 4 + end - start] for start, end in parts]
    assert columns["labels"] == [[12, 13], [6, 7], [0, 0], [0, 0]]
    assert examples.rows.tolist() == [0] * 4 and examples.lengths.tolist() == [15, 15, 15, 11]
    batch = batch_of(bert, examples, 0, 3)
    assert batch["documents"].tolist() == [[0] * 15, [0] * 11 + [-1] * 4]
    assert batch["segments"].tolist() == [[0] * 4 + [1] * 11, [0] * 4 + [1] * 7 + [0] * 4]
    assert batch["context"].tolist() == [[4, 14], [4, 10]] and batch["labels"].tolist() == [[12, 13], [0, 0]]


@pytest.mark.parametrize("count, parts", [(0, 1), (1, 1), (10, 1), (11, 2), (16, 2), (17, 3)])
def test_there_are_as_many_windows_as_needed(bert, tmp_path, count, parts):
    assert len(bert.encode(table_of(tmp_path, question(words(0, count))))) == parts


def test_a_model_that_looks_back_has_no_end_and_no_segments(tokenizers, tmp_path):
    task = make("extractive_qa", tokenizers["words"], "train.seq_len=15", "task.stride=4")
    examples = task.encode(table_of(tmp_path, question(words(0, 4), "w1")))
    assert examples.columns["inputs"][0].tolist() == [CLS, *ids(tokenizers["words"], "who sings"), SEP,
                                                      *ids(tokenizers["words"], words(0, 4))]  # fmt: skip
    assert sorted(examples.columns) == ["context", "inputs", "labels"]
    without_prefix = make("extractive_qa", tokenizers["bytes"], "train.seq_len=32", "task.stride=4")
    row = without_prefix.encode(table_of(tmp_path, question("ab", "b", text="")))
    assert row.columns["inputs"][0].tolist() == [0, *tokenizers["bytes"].encode("ab")]
    assert row.columns["labels"][0].tolist() == [2, 2], "position 0 is never of the context"


def test_a_long_question_is_cut_to_a_quarter(tokenizers, bert, tmp_path):
    examples = bert.encode(table_of(tmp_path, question("w5", "w5", text=words(10, 30))))
    expected = [CLS, *ids(tokenizers["words"], words(10, 13)), SEP, *ids(tokenizers["words"], "w5"), SEP]
    assert examples.columns["inputs"][0].tolist() == expected and examples.columns["labels"][0].tolist() == [5, 5]


def test_answers_inside_of_tokens_are_covered(bert, tmp_path):
    rows = [question("red cats w1", "at"), question("red cats w1", "s w"), question("red cats", " cat ".rstrip())]
    labels = bert.encode(table_of(tmp_path, *rows)).columns["labels"]
    assert [labels[i].tolist() for i in range(3)] == [[5, 5], [6, 7], [5, 5]]  # [CLS] who sings [SEP] red cat ##s w1


@pytest.mark.parametrize("kind", ["words", "bytes", "pieces"])
@pytest.mark.parametrize("looks", [("model.causal=true",), ENCODER])
def test_from_labels_back_to_answers(tokenizers, kind, looks, tmp_path):
    """Whatever the text, also over several windows; the answer is where it was, not where its like is."""
    task = make("extractive_qa", tokenizers[kind], *looks, "train.seq_len=40", "task.stride=14")
    rows = []
    for asked, marked in HARD:
        for before, after in (("", ""), (words(0, 30) + " ", " " + words(30, 39))):
            left, answer, right = re.split(r"[\[\]]", before + marked + after)
            rows.append(question(left + answer + right, answer, len(left), asked))
    table = table_of(tmp_path, *rows)
    examples = task.encode(table)
    assert len(examples) > len(rows)
    told = task.outputs(table, examples, perfect(task, examples))
    for one, row in zip(told, rows, strict=True):
        start, text = one["start"], one["answer"]
        gold, at = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        assert row["context"][start : start + len(text)] == text and one["score"] > 0.999
        if kind == "words":  # a word that it does not know is one token
            assert gold in text and start <= at < start + len(text)
        else:
            assert (text, start) == (gold, at)
    figures, details, _ = task.score(table, examples, perfect(task, examples))
    if kind != "words":
        assert figures == {"exact_match": 1.0, "f1": 1.0} and all(row["right"] for row in details)


def test_predictions_are_the_best_spans_of_the_formula(tokenizers, tmp_path):
    task = make("extractive_qa", tokenizers["words"], *ENCODER, "task.stride=4", "task.max_answer_tokens=3")
    examples = task.encode(table_of(tmp_path, *(question(words(0, n), "w1") for n in (2, 17, 9, 1 + 1))))
    batch = batch_of(task, examples)
    labels, inputs = batch.pop("labels"), batch
    logits = torch.randn(*inputs["inputs"].shape, 2, generator=torch.Generator().manual_seed(0)) * 3
    predictions = task.score_rows(lambda inputs, **others: logits, labels, **inputs)[:, 2:]
    for number, (best, first, last, nowhere) in enumerate(predictions.tolist()):
        real, (start, end) = int(examples.lengths[number]), inputs["context"][number].tolist()
        scores = logits[number, :real].double().log_softmax(0)
        spans = {(float(scores[a, 0] + scores[b, 1]), a - start, b - start)
                 for a in range(start, end) for b in range(a, min(a + 3, end))}  # fmt: skip
        expected = max(spans)
        assert (first, last) == expected[1:] and math.isclose(best, expected[0], rel_tol=1e-5)
        assert math.isclose(nowhere, float(scores[0].sum()), rel_tol=1e-5)


def test_padding_changes_neither_loss_nor_predictions(tokenizers, tmp_path):
    task = make("extractive_qa", tokenizers["words"], *ENCODER, "task.stride=4")
    examples = task.encode(table_of(tmp_path, question(words(0, 3), "w1"), question(words(0, 20), "w7 w8")))
    model = task_helpers.new_model(task).requires_grad_(False)
    alone = [task.score_rows(model, **batch_of(task, examples, i)) for i in (0, 1)]
    together = task.score_rows(model, **batch_of(task, examples))
    assert examples.lengths[0] < examples.lengths[1]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)
    logits = model(torch.from_numpy(examples.columns["inputs"][0].astype(np.int64))[None],
                   segments=torch.from_numpy(examples.columns["segments"][0].astype(np.int64))[None])  # fmt: skip
    first, last = examples.columns["labels"][0]
    expected = -(logits[0, :, 0].log_softmax(0)[first] + logits[0, :, 1].log_softmax(0)[last])
    assert math.isclose(float(together[0, 0]), float(expected), rel_tol=1e-5)


def test_no_answer_competes_where_there_may_be_none(tokenizers, tmp_path):
    table = table_of(tmp_path, question(words(0, 8), "w3"), question(words(0, 8)))
    settings = (*ENCODER, "task.stride=4")
    task = make("extractive_qa", tokenizers["words"], *settings, table=table)
    assert task.config.unanswerable is True
    examples = task.encode(table)
    told = task.outputs(table, examples, perfect(task, examples))
    assert told[0] == {"answer": "w3", "score": 1.0, "start": 9} and told[1] == {
        "answer": "",
        "score": 1.0,
        "start": None,
    }
    figures, details, _ = task.score(table, examples, perfect(task, examples))
    assert figures == {"exact_match": 1.0, "f1": 1.0}
    assert details[1] == {"question": "who sings", "gold": [], "prediction": "", "right": True, "score": 1.0}

    sure = make("extractive_qa", tokenizers["words"], *settings, "task.unanswerable=false", table=table)
    assert sure.config.unanswerable is False
    assert sure.outputs(table, examples, perfect(sure, examples))[1]["answer"] != ""
    assert sure.score(table, examples, perfect(sure, examples))[0] == {"exact_match": 0.5, "f1": 0.5}
    answered = table_of(tmp_path, question(words(0, 8), "w3"), name="answered.jsonl")
    assert make("extractive_qa", tokenizers["words"], *settings, table=answered).config.unanswerable is False


def test_one_window_with_an_answer_is_enough(tokenizers, bert, tmp_path):
    """No answer must be likelier than the best span in every window."""
    task = make("extractive_qa", tokenizers["words"], *ENCODER, "train.seq_len=15", "task.stride=4",
                "task.unanswerable=true")  # fmt: skip
    table = table_of(tmp_path, question(words(0, 16), "w12"))
    examples = task.encode(table)
    log = np.log
    said = np.array([[log(0.1), 0, 0, log(0.9)], [log(0.5), 6, 7, log(0.4)]])
    assert task.outputs(table, examples, said) == [{"answer": "w12 w13", "score": 0.5, "start": len(words(0, 12)) + 1}]
    said[1, 3] = log(0.6)
    assert task.outputs(table, examples, said) == [{"answer": "", "score": 0.6, "start": None}]


def test_without_gold_every_row_gives_an_answer(bert, tmp_path):
    table = table_of(tmp_path, *({"question": "who", "context": text} for text in (words(0, 24), "", "  ", "cat")))
    examples = bert.encode(table, with_gold=False)
    assert examples.rows.tolist() == [0, 0, 0, 1, 2, 3]
    batch = batch_of(bert, examples)
    assert (batch["labels"] == -100).all()
    rows = bert.score_rows(lambda inputs, **others: torch.zeros(*inputs.shape, 2), **batch).numpy()
    assert (rows[:, :2] == 0).all()
    told = bert.outputs(table, examples, rows[:, 2:])
    assert [one["answer"] for one in told] == ["w14", "", "", "cat"]  # the shortest window is the surest


@pytest.mark.parametrize("row, message", [
    (question(words(0, 9), "w3", 2), "line 2: the answer 'w3' is not at answer_start=2 (in characters): it is at 9"),
    (question(words(0, 9), "w8", -2), "the answer 'w8' is not at answer_start=-2 (in characters): it is at 24"),
    (question(words(0, 9), "red", 3), "answer 'red' is not at answer_start=3 (in characters): it is nowhere"),
    (question(words(0, 9), " ", 2), "line 2: an answer is empty: a question that has none is written with an empty"),
    (question(words(0, 30), words(5, 12)), "line 2: its answer has 7 tokens, and two windows share task.stride=4: no"),
    (question("w1 \x01 w2", "\x01"), "line 2: the answer '\\x01' has no token: this tokenizer drops its characters"),
])  # fmt: skip
def test_what_cannot_be_learnt_is_named_or_left_out(tokenizers, bert, tmp_path, row, message):
    table = table_of(tmp_path, question(words(0, 9), "w3"), row, question(words(0, 9)))
    with pytest.raises(ValueError, match="1 examples of .*rows.jsonl cannot be learnt from") as caught:
        bert.encode(table)
    assert message in str(caught.value) and "task.drop_bad=true" in str(caught.value)
    lenient = make("extractive_qa", tokenizers["words"], *ENCODER, "train.seq_len=15", "task.stride=4",
                   "task.drop_bad=true")  # fmt: skip
    examples = lenient.encode(table)
    assert examples.rows.tolist() == [0, 2] and len(examples.dropped) == 1 and message in f": {examples.dropped[0]}"
    figures, details, _ = lenient.score(table, examples, perfect(lenient, examples))
    assert [row["gold"] for row in details] == [["w3"], []]


def test_every_gold_answer_is_right_and_the_first_is_learnt(bert, tmp_path):
    row = question(words(0, 9), "w3") | {
        "answers": [{"text": "w3", "answer_start": 9}, {"text": "w5", "answer_start": 15}]
    }
    table = table_of(tmp_path, row)
    examples = bert.encode(table)
    assert examples.columns["labels"][0].tolist() == [7, 7]
    figures, details, _ = bert.score(table, examples, np.array([[-0.1, 5.0, 5.0, -9.0]]))
    assert figures == {"exact_match": 1.0, "f1": 1.0} and details[0]["gold"] == ["w3", "w5"]
    figures, details, _ = bert.score(table, examples, np.array([[-0.1, 3.0, 4.0, -9.0]]))
    assert figures["exact_match"] == 0 and math.isclose(figures["f1"], 2 / 3) and details[0]["prediction"] == "w3 w4"


def test_a_stride_that_leaves_no_way_on_is_refused(tokenizers):
    with pytest.raises(
        ValueError, match=r"task.stride=9 tokens, and one beside a long question has 9 .train.seq_len=15"
    ):
        make("extractive_qa", tokenizers["words"], *ENCODER, "train.seq_len=15", "task.stride=9")


def test_columns_have_the_names_that_the_config_says(tokenizers, tmp_path):
    row = question(words(0, 9), "w3")
    table = table_of(tmp_path, {"q": row["question"], "c": row["context"], "a": row["answers"]})
    names = ("task.question=q", "task.context=c", "task.answers=a")
    task = make("extractive_qa", tokenizers["words"], *ENCODER, "task.stride=4", *names, table=table)
    assert task.score(table, task.encode(table), np.array([[-0.1, 3.0, 3.0, -9.0]]))[1][0]["question"] == "who sings"
    with pytest.raises(ValueError, match="no column 'answers'.*task.answers=..."):
        make("extractive_qa", tokenizers["words"], *ENCODER, "task.stride=4", *names[:2], table=table)


def test_a_model_learns_which_words_answer(tokenizers, tmp_path):
    """The answer is the words "red w..." wherever they stand; where they do not, there is none."""
    chosen = np.random.default_rng(0).integers(0, 40, (160, 12))
    rows = []
    for number, picked in enumerate(chosen.tolist()):
        said = [f"w{i}" for i in picked]
        if number % 4:
            said[number % 11] = "red"
        answer = " ".join(said[number % 11 : number % 11 + 2]) if number % 4 else None
        rows.append(question(" ".join(said), answer))
    table, held_out = table_of(tmp_path, *rows[:128]), table_of(tmp_path, *rows[128:], name="held_out.jsonl")
    task = make("extractive_qa", tokenizers["words"], *ENCODER, "train.seq_len=15", "task.stride=4", table=table)
    figures, validation = judged(task, held_out, taught(task, table, steps=60))
    assert figures["val_f1"] >= 0.9 and figures["val_loss"] < 1.0, figures
    assert len(validation.details) == 32 and validation.facts["cut"] == 0
