"""Labels of texts and of pairs of texts: ids and segments as transformers has them, targets, figures, class weights."""

import math

import numpy as np
import pytest
import torch

from pretrain.examples.tables import read_table
from pretrain.tasks.task import encode_and_tell
from tests.task_helpers import batch_of, byte_level, judged, make, new_model, table_of, taught, word_pieces

WORDS = [f"w{i}" for i in range(30)]
CLS, SEP, NONE = 2, 3, -100
ENCODER = ("model.causal=false", "model.segments=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def words(folder):
    return word_pieces(folder / "words", WORDS)


def text(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def rows_of(labels: list, name: str = "label") -> list[dict]:
    return [{"text": text(number), name: label} for number, label in enumerate(labels)]


def logits_for(rows: list[list[float]]):
    """A model that says this."""
    return lambda inputs, **others: torch.tensor(rows)


# What the model reads


def test_texts_are_cut_and_stand_between_their_special_ids(words, tmp_path):
    table = table_of(tmp_path, {"text": text(0, 1), "label": "a"}, {"text": text(*range(9)), "label": "b"})
    task = make("classification", words, *ENCODER, "train.seq_len=6", table=table)
    examples = task.encode(table)
    ids = [words.encode(row["text"]) for row in table.rows]
    inputs = examples.columns["inputs"]
    assert [inputs[i].tolist() for i in (0, 1)] == [[CLS, *ids[0], SEP], [CLS, *ids[1][:4], SEP]]
    assert sorted(examples.columns) == ["inputs", "labels"], "one text has no segments"
    batch = batch_of(task, examples)
    assert batch["inputs"].tolist() == [[CLS, *ids[0], SEP, 0, 0], [CLS, *ids[1][:4], SEP]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, -1, -1], [0] * 6] and batch["labels"].tolist() == [0, 1]
    causal = make("classification", words, "train.seq_len=6", table=table).encode(table).columns["inputs"]
    assert [causal[i].tolist() for i in (0, 1)] == [[CLS, *ids[0]], [CLS, *ids[1][:5]]], "the text is not over"


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 9, 12, 13, 40])
def test_pairs_are_those_of_transformers(words, folder, tmp_path, limit):
    """Ids, segments and which of the two is cut where both do not fit."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "words" / "tokenizer.json"), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    lengths = [(0, 0), (0, 3), (3, 0), (1, 9), (9, 1), (4, 4), (5, 4), (4, 5), (2, 7), (12, 11), (1, 1)]
    rows = [{"a": text(*range(first)), "b": text(*range(10, 10 + second)), "label": str(number % 2)}
            for number, (first, second) in enumerate(lengths)]  # fmt: skip
    table = table_of(tmp_path, *rows)
    names = ("task.text=a", "task.text_pair=b")
    task = make("classification", words, *ENCODER, *names, f"train.seq_len={limit}", table=table)
    columns = task.encode(table).columns
    pairs = [[row[name] for row in rows] for name in "ab"]  # one by one it takes an empty second text for none
    expected = theirs(*pairs, truncation=True, max_length=limit, return_token_type_ids=True)
    for number in range(len(rows)):
        assert columns["inputs"][number].tolist() == expected["input_ids"][number], lengths[number]
        assert columns["segments"][number].tolist() == expected["token_type_ids"][number], lengths[number]
    batch = batch_of(task, task.encode(table), 0, 9)
    assert batch["segments"].shape == batch["inputs"].shape == batch["documents"].shape
    assert (batch["segments"][0, 3:] == 0).all(), "padding is of segment 0"


def test_a_model_without_segments_or_that_looks_back_reads_pairs_too(words, folder, tmp_path):
    table = table_of(tmp_path, *({"text": "w1 w2", "other": "w3", "label": label} for label in "ab"))
    ids = [CLS, *words.encode("w1 w2"), SEP, *words.encode("w3")]
    for looks, expected in (("model.causal=false", [*ids, SEP]), ("model.causal=true", ids)):
        columns = make("classification", words, looks, "task.text_pair=other", table=table).encode(table).columns
        assert columns["inputs"][0].tolist() == expected and "segments" not in columns
    gpt = byte_level(folder / "bytes")
    columns = make("classification", gpt, "task.text_pair=other", table=table).encode(table).columns
    assert columns["inputs"][0].tolist() == [*gpt.encode("w1 w2"), gpt.eos, *gpt.encode("w3")]


def test_what_is_cut_is_counted_and_said(words, tmp_path, capsys):
    table = table_of(tmp_path, {"text": "w1 w2 w3", "label": "a"}, {"text": "w1 " * 20, "label": "b"})
    task = make("classification", words, "train.seq_len=6", *ENCODER, table=table)
    special = len(words.prefix) + len(words.suffix)
    examples = encode_and_tell(task, table)
    lost = 20 + special - 6
    assert examples.sizes() == {"longest": 20 + special, "cut": 1, "cut_tokens": lost}
    share = lost / (23 + 2 * special)
    said = f"1 of 2 examples are cut to train.seq_len=6 ({share:.1%} of the tokens; the longest has {20 + special})"
    assert f"rows.jsonl: {said}" in capsys.readouterr().err
    longer = make("classification", words, "train.seq_len=32", *ENCODER, table=table)
    assert encode_and_tell(longer, table).sizes()["cut"] == 0 and capsys.readouterr().err == ""


# One label


def test_labels_that_are_nearly_one_are_said_and_nan_is_none(words, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    make("classification", words, table=table_of(tmp_path, *rows_of(["pos", "pos ", "neg", "Neg"])))
    said = "the labels 'Neg' and 'neg'; 'pos' and 'pos ' differ by spaces or case only, and are classes of their own"
    assert said in capsys.readouterr().err
    columns = {"text": ["a", "b", "c"], "label": [1.0, float("nan"), 2.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    table = read_table(str(tmp_path / "rows.parquet"), "data.train")
    with pytest.raises(ValueError, match=r"rows.parquet, row 2: column 'label' \(task.label\) is NaN"):
        make("classification", words, table=table)
    assert make("classification", words, "task.drop_bad=true", table=table).labels == ["1.0", "2.0"]


def test_labels_are_those_of_the_table_sorted_also_numbers(words, tmp_path):
    table = table_of(tmp_path, *rows_of([10, 9, True, 0.5, "b", 9]))
    task = make("classification", words, *ENCODER, table=table)
    assert task.labels == ["0.5", "10", "9", "True", "b"]
    assert task.described() == {"name": "classification", "labels": task.labels, "multi_label": False}
    assert batch_of(task, task.encode(table))["labels"].tolist() == [1, 2, 3, 0, 4, 2]
    given = make("classification", words, "task.labels=[b,'10','9','True','0.5',never]", table=table)
    assert given.labels == ["b", "10", "9", "True", "0.5", "never"]
    assert batch_of(given, given.encode(table))["labels"].tolist() == [1, 2, 3, 4, 0, 2]
    many = make("classification", words, f"task.labels=[{','.join(f'label_{i}' for i in range(3000))}]")
    with pytest.raises(ValueError) as refused:
        many.encode(table_of(tmp_path, *rows_of(["label_17", "lable_17"]), name="many.jsonl"))
    assert "the label 'lable_17' is none of 3,000 (the nearest are 'label_17'" in str(refused.value)
    assert len(str(refused.value)) < 400
    alone = table_of(tmp_path, *rows_of([3, 3]), name="alone.jsonl")
    with pytest.raises(ValueError, match="alone.jsonl has only the label 3: there is nothing to tell apart"):
        make("classification", words, table=alone)
    with pytest.raises(ValueError, match=r"line 5: the label 'b' is none of 10, 9, True, 0.5"):
        make("classification", words, "task.labels=['10','9','True','0.5']").encode(table)


def test_one_label_is_scored(words, tmp_path):
    table = table_of(tmp_path, *rows_of(["x", "y", "x", "z"]))
    task = make("classification", words, *ENCODER, table=table)
    assert (task.head, task.best, task.labels) == ("sequence", "val_macro_f1", ["x", "y", "z"])
    examples = task.encode(table)
    batch = batch_of(task, examples)
    model = logits_for([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    rows = task.score_rows(model, **batch).numpy()
    assert rows[:, 1].tolist() == [1.0] * 4 and rows.shape == (4, 2 + 3)
    expected = [-2 + math.log(math.e**2 + 2), -3 + math.log(math.e**3 + 2), math.log(math.e + 2),
                -1 + math.log(math.e + 2)]  # fmt: skip
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert task.loss_rows(model, **batch).tolist() == pytest.approx(expected, rel=1e-6)
    told = task.outputs(table, examples, rows[:, 2:])
    assert [row["label"] for row in told] == ["x", "y", "y", "z"]
    assert told[0]["scores"] == {"x": 0.786986, "y": 0.106507, "z": 0.106507}
    figures, details, facts = task.score(table, examples, rows[:, 2:])
    f1 = {"x": 2 * 1 / (2 + 1), "y": 2 * 1 / (1 + 2), "z": 1.0}
    assert figures == pytest.approx({"accuracy": 0.75, "macro_f1": sum(f1.values()) / 3}, rel=1e-6)
    assert set(task.figures_of(examples)) == {"loss", *figures}
    of_each = facts.pop("per_label")
    assert facts == {"labels": ["x", "y", "z"], "confusion": [[1, 1, 0], [0, 1, 0], [0, 0, 1]]}
    assert of_each[0] == {"label": "x", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert details[2] == {"text": "w2", "gold": "x", "prediction": "y", "right": False,
                          "score": pytest.approx(math.e / (math.e + 2))}  # fmt: skip
    assert [row["right"] for row in details] == [True, True, False, True]


def test_without_gold_there_are_no_targets(words, tmp_path):
    for more, shape in (("task.multi_label=false", (2,)), ("task.multi_label=true", (2, 3))):
        task = make("classification", words, *ENCODER, "task.labels=[a,b,c]", more)
        examples = task.encode(table_of(tmp_path, {"text": "w1"}, {"text": ""}), with_gold=False)
        batch = batch_of(task, examples)
        assert batch["labels"].shape == shape and (batch["labels"] == NONE).all()
        assert (task.score_rows(logits_for([[1.0, 2.0, 3.0]] * 2), **batch)[:, :2] == 0).all()


def test_balanced_weights_make_labels_count_alike(words, tmp_path):
    """sklearn's: rows / (labels * rows of this label); a label without rows changes no other's weight."""
    table = table_of(tmp_path, *rows_of(["x"] * 6 + ["y"] * 2))
    weighted = make("classification", words, *ENCODER, "task.class_weights=balanced", table=table)
    examples = weighted.encode(table)
    weighted.weigh(examples)
    assert weighted.weights.tolist() == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    plain, batch = make("classification", words, *ENCODER, table=table), batch_of(weighted, examples)
    plain.weigh(examples)
    assert plain.weights is None
    model = new_model(plain).requires_grad_(False)
    ratio = weighted.loss_rows(model, **batch) / plain.loss_rows(model, **batch)
    torch.testing.assert_close(ratio, torch.tensor([8 / 12] * 6 + [2.0] * 2))
    assert float(weighted.loss_rows(logits_for([[0.0, 0.0]] * 8), **batch).sum()) == pytest.approx(8 * math.log(2))


# Several labels


def test_several_labels(words, tmp_path):
    table = table_of(tmp_path, *rows_of([["b", "a"], [], ["c", 7, "c"]]))
    task = make("classification", words, *ENCODER, "task.multi_label=true", table=table)
    assert task.labels == ["7", "a", "b", "c"] and task.best == "val_micro_f1" and task.described()["multi_label"]
    examples = task.encode(table)
    batch = batch_of(task, examples)
    gold = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert batch["labels"].tolist() == gold
    logits = [[-1.0, 2.0, 1.0, -2.0], [-1.0, -1.0, 0.5, -3.0], [1.0, -1.0, -1.0, -0.5]]
    rows = task.score_rows(logits_for(logits), **batch).numpy()
    expected = [sum(math.log1p(math.exp(-x if y else x)) for x, y in zip(*pair, strict=True))
                for pair in zip(logits, gold, strict=True)]  # fmt: skip
    assert rows[:, 0].tolist() == pytest.approx(expected, rel=1e-6) and rows[:, 1].tolist() == [4.0] * 3
    told = task.outputs(table, examples, rows[:, 2:])
    assert [row["labels"] for row in told] == [["a", "b"], ["b"], ["7"]]
    assert told[0]["scores"]["a"] == round(1 / (1 + math.exp(-2)), 6)
    figures, details, facts = task.score(table, examples, rows[:, 2:])
    found = {"micro_f1": 2 * 3 / (4 + 4), "macro_f1": (1 + 1 + 2 / 3 + 0) / 4, "subset_accuracy": 1 / 3}
    assert figures == pytest.approx(found) and facts == {}
    assert set(task.figures_of(examples)) == {"loss", *figures}
    assert [(row["gold"], row["prediction"], row["right"]) for row in details] == [
        (["a", "b"], ["a", "b"], True), ([], ["b"], False), (["7", "c"], ["7"], False),
    ]  # fmt: skip


def test_lists_and_single_labels_are_not_mixed_up(words, tmp_path):
    for labels, more, said in ((["a", ["a"]], "false", "must be one label .task.multi_label=true is for lists"),
                               ([["a"], "b"], "true", "must be a list of labels")):  # fmt: skip
        with pytest.raises(ValueError, match=f"line 2: label=.* {said}"):
            make("classification", words, f"task.multi_label={more}", table=table_of(tmp_path, *rows_of(labels)))


# All of it


@pytest.mark.parametrize("kind", ["single", "several", "pair"])
def test_a_model_learns(words, tmp_path, kind):
    """Whether there is a word below 4; and one above 25; whether the second text begins with the first one's word."""
    rows, random = [], np.random.default_rng(0)
    for number in range(160):
        few = random.integers(4, 26, 6)
        some = number % 2 == 1, number % 4 > 1
        few[0], few[1] = (number % 4 if some[0] else few[0]), (26 + number % 4 if some[1] else few[1])
        row = {"text": text(*random.permutation(few)), "label": "yes" if some[0] else "no"}
        if kind == "several":
            row["label"] = [name for name, has in zip(("low", "high"), some, strict=True) if has]
        if kind == "pair":
            row |= {"text": text(number % 5), "other": text(number % 5 if some[0] else 5)}
        rows.append(row)
    more = {"single": [], "several": ["task.multi_label=true"], "pair": ["task.text_pair=other"]}[kind]
    table, held_out = table_of(tmp_path, *rows[:128]), table_of(tmp_path, *rows[128:], name="held_out.jsonl")
    task = make("classification", words, *ENCODER, *more, table=table)
    figures, validation = judged(task, held_out, taught(task, table, steps=60))
    assert figures[task.best] > 0.9 and figures["val_loss"] < 0.5, figures
    assert len(validation.details) == 32
