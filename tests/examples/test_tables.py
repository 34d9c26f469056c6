"""Tables of examples: every format gives the same rows, each with its place, and every mistake is named there."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from pretrain.examples.formats import answers
from pretrain.examples.tables import read_table
from tests.prepare.test_documents import write_tar

ROWS = [{"text": 'two\nlines, "quoted" 中文', "label": "a"}, {"text": "e\u0301 🎉", "label": "b"}]
CSV = 'text,label\r\n"two\nlines, ""quoted"" 中文",a\r\ne\u0301 🎉,b\r\n'
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*paths: Path):
    return read_table([str(path) for path in paths], "data.train")


def refuses(path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(write(path, content))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value), caught.value


# Formats


def test_every_format_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    members = [(f"d/{i}.{name}", row[column].encode()) for i, row in enumerate(ROWS)
               for name, column in (("txt", "text"), ("cls", "label"))]  # fmt: skip
    bom = b"\xef\xbb\xbf"
    write_tar(tmp_path / "a.tar", [(f"{i}.json", bom + json.dumps(row).encode()) for i, row in enumerate(ROWS)])
    write_tar(tmp_path / "b.tar", members)
    paths = {
        write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\n\n")): ["line 1", "line 3"],
        write(tmp_path / "a.json", json.dumps(ROWS, indent=1)): ["row 1", "row 2"],
        write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS})): ["row 1", "row 2"],
        write(tmp_path / "a.csv", CSV): ["line 2", "line 4"],
        write(tmp_path / "b.csv", "\ufeff" + CSV): ["line 2", "line 4"],
        write(tmp_path / "a.tsv", CSV.replace('",a', '"\ta').replace("🎉,b", "🎉\tb").replace("t,l", "t\tl")):
            ["line 2", "line 4"],
        write(tmp_path / "c.jsonl.gz", gzip.compress(JSONL)): ["line 1", "line 2"],
        write(tmp_path / "d.csv.zst", zstandard.compress(CSV.encode())): ["line 2", "line 4"],
        write(tmp_path / "e.csv", CSV.replace("\r\n", "\r")): ["line 2", "line 4"],
        tmp_path / "a.parquet": ["row 1", "row 2"],
        tmp_path / "a.tar": ["sample 0", "sample 1"],
    }  # fmt: skip
    for path, places in paths.items():
        table = read(path)
        assert table.rows == ROWS and table.columns == ["text", "label"], path
        assert [table.place(i) for i in range(2)] == [f"{path}, {place}" for place in places]
    assert read(tmp_path / "b.tar").rows == [{"txt": row["text"], "cls": row["label"]} for row in ROWS]


def test_samples_of_webdataset_and_whole_texts(tmp_path):
    numbers = [("x.json", b'{"score": 2.5}'), ("x.txt", b"one"), ("x.cls", b" 3\n"), ("x.question.txt", "中".encode())]
    table = read(write_tar(tmp_path / "a.tar", numbers))
    assert table.rows == [{"score": 2.5, "txt": "one", "cls": 3, "question.txt": "中"}]
    table = read(write(tmp_path / "a.txt", "one\r\ntwo\n"), write(tmp_path / "b.txt.gz", gzip.compress(b"three")))
    assert table.texts("text", "task.text") == ["one\r\ntwo\n", "three"]
    assert [table.place(i) for i in range(2)] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")]


def test_squad_both_versions(tmp_path):
    answered = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}] * 2}
    impossible = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True,
                  "plausible_answers": [{"text": "Ada", "answer_start": 0}]}  # fmt: skip
    paragraphs = [{"context": "Ada wrote.", "qas": [answered, impossible]}]
    squad = {"version": "v2.0", "data": [{"title": "Ada", "paragraphs": paragraphs}]}
    table = read(write(tmp_path / "a.json", json.dumps(squad)))
    same = {"title": "Ada", "context": "Ada wrote."}
    assert table.rows == [
        {"id": "q1", "question": "Who?", "answers": {"text": ["Ada"] * 2, "answer_start": [0, 0]}, **same},
        {"id": "q2", "question": "Why?", "answers": {"text": [], "answer_start": []}, **same},
    ]
    assert table.place(1) == f"{tmp_path / 'a.json'}, row 2"
    assert answers([{"text": "b", "answer_start": 3}], "x") == answers({"text": ["b"], "answer_start": [3]}, "x")
    for wrong in ({"text": ["b"], "answer_start": []}, "b", [{"text": "b"}], {"text": ["b"], "answer_start": ["3"]}):
        with pytest.raises(ValueError, match=r"^here: answers must be .* not "):
            answers(wrong, "here")
    answered["answer"] = answered.pop("answers")
    with pytest.raises(ValueError, match="line|row 1|missing"):
        read(write(tmp_path / "d.json", json.dumps(squad))).column("answers", "task.answers").value(0)
    impossible["answer"] = impossible.pop("answers")
    with pytest.raises(ValueError, match=r"d.json has no column 'answers' \(did you mean 'answer'\?\)"):
        read(write(tmp_path / "d.json", json.dumps(squad))).column("answers", "task.answers")
    answered["answers"], impossible["answers"] = answered.pop("answer"), impossible.pop("answer")
    del paragraphs[0]["context"]
    refuses(tmp_path / "b.json", json.dumps(squad), "article 'Ada' is not as in SQuAD")
    paragraphs[0]["context"], answered["answers"] = "Ada wrote.", [{"text": "Ada"}]
    refuses(tmp_path / "c.json", json.dumps(squad), "question 'q1': answers must be")


def test_a_folder_and_a_list_are_their_files_in_order(tmp_path):
    first = write(tmp_path / "2.jsonl", '{"n": 1}\n{"n": 2}')
    write(tmp_path / "10.csv", "n,m\n0,x\n")
    write(tmp_path / "README.md", "no data")
    (tmp_path / "sub").mkdir()
    table = read(tmp_path, first)
    assert [row["n"] for row in table.rows] == ["0", 1, 2, 1, 2]
    assert table.columns == ["n", "m"] and table.location == f"{tmp_path}, {first}"
    assert table.place(0) == f"{tmp_path}/10.csv, line 2" and table.place(4) == f"{first}, line 2"
    assert read_table(str(first), "data.val").rows == table.rows[1:3]


# Columns


def test_columns_and_what_they_lack(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "label": 1, "note": null}\n\n{"text": 5, "label": 0}\n')
    table = read(path)
    label, note = table.column("label", "task.label"), table.column("note", "task.label")
    assert [label.value(0), label.value(1)] == [1, 0] and table.columns == ["text", "label", "note"]
    with pytest.raises(ValueError) as caught:
        table.column("lable", "task.label")
    assert str(caught.value) == (f"{path} has no column 'lable' (did you mean 'label'?): there is text, label, note; "
                                 "name the right one with task.label=...")  # fmt: skip
    with pytest.raises(ValueError, match=r"^column 'note' \(task.label\) is null: give it a value"):
        note.value(0)
    with pytest.raises(ValueError, match=r"^column 'note' \(task.label\) is missing"):
        note.text(1)
    assert table.column("text", "task.text").text(0) == "x"
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: column 'text' holds 5, not text: .* task.text=..."):
        table.texts("text", "task.text")


# Mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JSONL + b'{"text": "x"\n', ", line 3: not valid JSON (Expecting ',' delimiter"),
        (JSONL + b'\n{"text": "x", "text": "y"}', ", line 4: the key 'text' is there twice"),
        (JSONL + b'{"a": {"b": 1, "b": 1}}', ", line 3: the key 'b' is there twice"),
        (JSONL + b'["x"]\n', ', line 3: a row must be an object, as {"text": ...}, not ["x"]'),
        (JSONL + b'{"text": "caf\xe9"}\n', ", line 3: not UTF-8 (invalid continuation byte, byte 14): convert"),
        (JSONL + b'{"text": "\\ud83d"}\n', ", line 3: half a character"),
        (JSONL + b'{"score": NaN}\n', ", line 3: NaN is no number of JSON"),
        (b"[" * 100_000, ", line 1: not valid JSON"),
        (b"\n \n", " holds no rows"),
        (b"", " holds no rows"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    refuses(tmp_path / "a.jsonl", content, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\ny\n", ", line 3: 1 fields, and the header names 2"),
        ("a.csv", "text,label\n\"x\ny\",1\nb,c,d\n", ", line 4: 3 fields"),
        ("a.csv", 'text\n"x\n', ", line 2: unexpected end of data"),
        ("a.csv", 'text\n"x" y\n', ", line 2: ',' expected after '\"'"),
        ("a.csv", b"text\nx\ncaf\xe9\n", ", line 3: not UTF-8"),
        ("a.csv", "text,text\nx,y\n", ", line 1: it must name the columns, each once (there is: 'text', 'text')"),
        ("a.csv", "text,\nx,y\n", ", line 1: it must name the columns"),
        ("a.csv", "text\n", " holds no rows"),
        ("a.txt", "", " holds no rows"),
        ("a.txt", b"\xff", ": not UTF-8"),
        ("a.csv", "text,label\nx,y\n".encode("utf-16"), " is UTF-16, not UTF-8: convert it, as with iconv"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), " is UTF-16"),
        ("a.json", "[]", " holds no rows"),
        ("a.json", '{"text": "x"}', ': it must be an array of objects, or an object with an array "data"'),
        ("a.json", JSONL, "Extra data: line 2 column 1 (char 62)); if each line is an object of its own, name"),
        ("a.json", '[{"a": 1}, 2]', ": row 2: a row must be an object"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], " is damaged or cut short"),
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-3], " is damaged or cut short"),
        ("a.parquet", "PAR1", " is damaged or not a Parquet file"),
        ("a.tar", "x" * 1024, " is not a whole, uncompressed tar file"),
        ("a.tar.gz", gzip.compress(b"", mtime=0), " is compressed as a whole: unpack it first"),
        ("a.xlsx", "x", " is of a kind that is not read: give one of .jsonl, .json, .csv"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    refuses(tmp_path / name, content, message)


def test_bad_members_and_columns_are_named(tmp_path):
    for member, data, message in (
        ("x.json", b'{"txt": 1}', "member x.json: the column 'txt' is there already"),
        ("x.json", b"[1]", "member x.json: a row must be an object"),
        ("x.png", b"\x89PNG", "member x.png: not UTF-8"),
        ("x.pkl", b"", "member 'x.pkl' is a pickle"),
        ("../y.txt", b"", "points out of the archive"),
    ):
        path = write_tar(tmp_path / "a.tar", [("x.txt", b"t"), (member, data)])
        refuses(path, path.read_bytes(), message)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    text = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    refuses(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes(), ", after row 0: not UTF-8")


def test_what_is_not_there_is_named_with_its_setting(tmp_path):
    (tmp_path / "empty").mkdir()
    for location, message in (
        (tmp_path / "gone.jsonl", "data.train: .*gone.jsonl: is not there"),
        ("https://host/a.jsonl", "data.train: https://host/a.jsonl: copy it here first"),
        (tmp_path / "empty", "data.train: the folder .*empty holds no file of a kind that is read: .jsonl, .json"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(str(location), "data.train")
