"""The example data sets: splits that share no text and depend on nothing else; each of them made from its source."""

import gettext
import io
import json
import struct
import sys
from collections import Counter

import pytest

from pretrain.examples.formats import answers
from pretrain.examples.tables import read_table
from tools import example_data
from tools.example_data import MAKERS, Example, Synset, split


def examples(count: int = 1000) -> list[Example]:
    return [Example({"text": f"text {i}", "label": label}, f"group {i // 2}", label)
            for i in range(count) for label in ("ab"[i // 2 % 5 == 0],)]  # fmt: skip


def test_splits_are_exact_shares_of_each_stratum_and_share_no_group():
    splits = split(examples())
    assert {name: Counter(row["label"] for row in rows) for name, rows in splits.items()} == {
        "train": {"a": 640, "b": 160}, "val": {"a": 80, "b": 20}, "test": {"a": 80, "b": 20},
    }  # fmt: skip
    groups = [{int(row["text"].split()[1]) // 2 for row in rows} for rows in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 500
    assert [row["label"] for row in splits["train"]] != sorted(row["label"] for row in splits["train"])


def test_splits_depend_on_the_texts_alone():
    assert split(examples()[::-1])["val"] != split(examples())["val"]  # rows of a group stay in their order
    backwards = [example for i in range(998, -2, -2) for example in examples()[i : i + 2]]
    assert split(backwards) == split(examples())


def test_a_group_of_two_strata_is_in_one_split():
    mixed = [Example({"n": i}, f"group {i % 500}", "ab"[i // 500]) for i in range(1000)]
    groups = [{row["n"] % 500 for row in rows} for rows in split(mixed).values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 500


def test_a_limit_keeps_the_shares_and_the_splits():
    few, all_rows = split(examples(), 100), split(examples())
    assert Counter(row["label"] for rows in few.values() for row in rows) == {"a": 80, "b": 20}
    assert [len(rows) for rows in few.values()] == [80, 10, 10]
    train = [row for row in all_rows["train"]]
    assert all(row in train for row in few["train"]) and split(examples(), 10**6) == all_rows
    with pytest.raises(ValueError, match="--limit 0: give 1 or more"):
        example_data.main(["similarity", "--output", "nowhere", "--limit", "0"])


def test_texts_are_labelled_once_or_left_out():
    pairs = [("Good  day", "pos"), ("good day", "pos"), ("ﬁne", "pos"), ("fine", "neg"), (" ", "neg"), ("bad", "neg")]
    assert [*example_data._labelled(iter(pairs))] == [
        Example({"text": "Good  day", "label": "pos"}, "good day", "pos"),
        Example({"text": "bad", "label": "neg"}, "bad", "neg"),
    ]


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_of_a_catalogue_are_those_of_gettext(order):
    texts = [("", "Content-Type: text/plain; charset=UTF-8\n"), ("menu\x04Open file", "Datei öffnen"),
             ("one file\0%d files", "eine Datei\0%d Dateien")]  # fmt: skip
    blobs = [text.encode() + b"\0" for pair in zip(*texts, strict=True) for text in pair]
    starts = [28 + 8 * len(blobs) + sum(map(len, blobs[:i])) for i in range(len(blobs))]
    table = b"".join(struct.pack(order + "II", len(b) - 1, start) for b, start in zip(blobs, starts, strict=True))
    head = struct.pack(order + "7I", 0x950412DE, 0, 3, 28, 28 + 8 * 3, 0, 0)
    data = head + table + b"".join(blobs)
    theirs = gettext.GNUTranslations(io.BytesIO(data))
    assert theirs.pgettext("menu", "Open file") == "Datei öffnen"
    assert [*example_data._messages(data)][1:] == [("Open file", "Datei öffnen"), ("one file", "eine Datei")]
    assert theirs.ngettext("one file", "%d files", 1) == "eine Datei"


def test_questions_are_answered_by_their_spans():
    bacon = Synset("18", True, ["Bacon", "Roger Bacon"], "English scientist and monk who stressed the importance of "
                   "experimentation; noted for his lenses (born in Ilchester) (1220-1292)")  # fmt: skip
    evert = Synset("18", True, ["Evert"], "United States tennis player (born in 1954)")
    paragraph = example_data._paragraph([bacon, evert], example_data.PERSON_QUESTIONS)
    context = paragraph["context"]
    assert context == f"Roger Bacon: {bacon.definition}. Evert: {evert.definition}."
    found = {}
    for question in paragraph["qas"]:
        (text,), (start,) = answers(question["answers"], "")
        assert context[start : start + len(text)] == text and (start > context.index("Evert")) == (
            "Evert" in question["question"]
        )
        found[question["question"]] = text
    assert found == {
        "When was Bacon born?": "1220", "When did Bacon die?": "1292", "Where was Bacon born?": "Ilchester",
        "What nationality was Bacon?": "English", "What was Bacon by profession?": "scientist",
        "What did Bacon do?": "stressed the importance of experimentation", "What is Bacon noted for?": "his lenses",
        "When was Evert born?": "1954", "What nationality was Evert?": "United States",
        "What was Evert by profession?": "tennis player",
    }  # fmt: skip


def test_tags_are_those_of_the_words():
    line = "中国/ns  主席/n  江/nr  泽民/nr  、/w  李/nr  鹏/nr  李/nr  。/w  新华社/nt  报道/v"
    first, second = example_data._sentences(line)
    assert "".join(first["tokens"]) == "中国主席江泽民、李鹏李。"
    assert first["tags"] == ["B-LOC", "I-LOC", "O", "O", "B-PER", "I-PER", "I-PER", "O", "B-PER", "I-PER", "B-PER", "O"]
    assert second == {"tokens": [*"新华社报道"], "tags": ["B-ORG", "I-ORG", "I-ORG", "O", "O"]}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="no-such-program is not here"):
        example_data._run("no-such-program", cwd=tmp_path)
    with pytest.raises(ValueError, match="is there a network"):
        example_data._run(sys.executable, "-c", "raise SystemExit(1)", cwd=tmp_path)


# From their sources

COLUMNS = {
    "sentiment": ["text", "label"], "reviews": ["text", "label"], "glosses": ["query", "document"],
    "translation": ["en", "de"], "summaries": ["text", "summary"], "tags": ["tokens", "tags"],
    "similarity": ["query", "document", "score"], "questions": ["id", "title", "context", "question", "answers"],
}  # fmt: skip
LEAST = {"sentiment": 37_000, "reviews": 17_000, "glosses": 90_000, "translation": 25_000, "summaries": 20_000,
         "tags": 40_000, "similarity": 1_300, "questions": 15_000}  # fmt: skip
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tool, tmp_path_factory):
    """A data set, its folder and its tables; skipped where its source cannot be reached."""
    folder = tmp_path_factory.mktemp(request.param)
    done = tool("example_data.py", request.param, "--output", folder, check=False)
    if done.returncode == 2 and ("is there a network?" in done.stderr or "is not here" in done.stderr):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    paths = {name: next(folder.glob(f"{name}.json*")) for name in SPLITS}
    return request.param, folder, {name: read_table(str(path), "data.train") for name, path in paths.items()}


@pytest.mark.slow
def test_a_data_set_is_whole_and_its_splits_share_no_text(made):
    name, folder, tables = made
    sizes = [len(tables[split].rows) for split in SPLITS]
    assert sum(sizes) >= LEAST[name] and all(0.07 < size / sum(sizes) < 0.13 for size in sizes[1:])
    assert all(table.columns == COLUMNS[name] for table in tables.values())
    key = {"questions": "context"}.get(name, COLUMNS[name][0])
    if name != "similarity":  # there the pairs differ, not the words
        texts = [{json.dumps(row[key]) for row in tables[split].rows} for split in SPLITS]
        assert sum(map(len, texts)) == len(set.union(*texts))
    if name == "questions":
        for row in tables["test"].rows:
            (text,), (start,) = row["answers"].values()
            assert row["context"][start : start + len(text)] == text
    if name == "reviews":
        unlabelled = read_table(str(folder / "unlabelled.jsonl"), "x").texts("text", "x")
        assert unlabelled == tables["train"].texts("text", "x")
    if name == "tags":
        assert {tag for row in tables["test"].rows for tag in row["tags"]} == {
            "O", *(f"{place}-{kind}" for place in "BI" for kind in ("PER", "LOC", "ORG"))}  # fmt: skip
        assert all(len(row["tokens"]) == len(row["tags"]) for row in tables["train"].rows)
