"""Which files are read: each once, whatever its names, as what it is; what is passed over is named with the reason."""

import bz2
import csv
import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from pretrain.prepare.documents import Counts, read_documents
from pretrain.prepare.finding import find_files
from tools import write_shards


def names(folder: Path, **choice) -> tuple[list[str], dict[str, str]]:
    found = find_files([folder], **choice)
    passed = {os.path.relpath(name, folder): reason for name, reason in found.passed_over}
    return [os.path.relpath(file.file, folder) for file in found.files], passed


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with links to a folder, a file, nothing and itself, and files of other kinds."""
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for folder in (tree / "inner", elsewhere):
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(folder.name)
    (tree / "linked").symlink_to(elsewhere)
    (tree / "again").symlink_to(elsewhere)
    (tree / "inner" / "loop").symlink_to(tree)
    (tree / "alias.txt").symlink_to(tree / "inner" / "text.txt")
    (tree / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tree / "pipe.txt")
    for name in ("facts.json", "more.json", "table.csv"):
        (tree / name).write_text("[]")
    return tree


def test_links_are_followed_once_and_what_is_not_read_is_named(tree, tmp_path, capsys):
    found, passed = names(tree)
    assert found == ["alias.txt", "again/text.txt"]
    other = "of a kind that is not read"
    assert passed == {
        "facts.json": other, "more.json": other, "table.csv": other, "gone.txt": "links to nothing",
        "pipe.txt": "no plain files", "inner/text.txt": "read already, by another name",
        "inner/loop": "folders met already, by another name", "linked": "folders met already, by another name",
    }  # fmt: skip
    (note,) = find_files([tree]).notes()
    assert "3 of a kind that is not read (.json 2, .csv 1: --include GLOB takes them)" in note
    assert f"1 links to nothing (first: {tree / 'gone.txt'})" in note
    assert names(tree, exclude=["*.json", "*.csv", "pipe*", "gone*", "again", "alias*", "loop"]) == (
        ["inner/text.txt", "linked/text.txt"], {},
    )  # fmt: skip


def test_what_was_passed_over_is_told_and_kept(tree, tmp_path, byte_tokenizer, capsys):
    line = ["--input", str(tree), "--tokenizer", str(byte_tokenizer), "--output", str(tmp_path / "out")]
    write_shards.main(line)
    assert "note: passed over: 3 of a kind" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "inputs.json").read_text())["passed_over"]
    assert kept["count"] == 8 and {"file": str(tree / "gone.txt"), "reason": "links to nothing"} in kept["first"]


HTML = {
    "page.html": b"<!DOCTYPE html>\n<p>x", "plain.txt": b"\xef\xbb\xbf \n\n<HTML lang=en><p>x",
    "old.md": b'<?xml version="1.0"?>\n<!doctype  HTML PUBLIC "x">', "packed.txt.gz": gzip.compress(b"<html>\n<p>x"),
    "packed.txt.zst": zstandard.ZstdCompressor().compress(b"<html>\n<p>x"),
}  # fmt: skip
TEXT = {
    "part.html": b"<p>no page", "about.txt": b"Write <html> first.", "empty.txt": b"", "tag.txt": b"<htmlish>",
    "rows.jsonl": b'{"text": "<html>"}', "far.txt": b" " * 5000 + b"<html>",
}  # fmt: skip


def test_pages_that_are_taken_as_plain_text_are_told_and_kept(tmp_path, byte_tokenizer, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in (HTML | TEXT).items():
        (folder / name).write_bytes(data)
    expected = sorted(str(folder / name) for name in HTML)
    assert find_files([folder]).html == expected
    assert find_files([folder / name for name in sorted(HTML | TEXT)]).html == expected  # named outright: the same
    write_shards.main([*map(str, ["--input", folder, "--tokenizer", byte_tokenizer, "--output", tmp_path / "out"])])
    assert (f"note: 5 files look like HTML (first: {expected[0]}): their tags become text: extract it first (as with "
            "trafilatura), or leave them out with --exclude GLOB\n") in capsys.readouterr().out  # fmt: skip
    kept = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert kept["html"] == {"count": 5, "first": expected} and "source_code" not in kept and "passed_over" not in kept


def test_source_code_is_told_where_nobody_asked_for_it(tmp_path, byte_tokenizer, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.py", "c.C.gz", "d.md", "e.js"):
        (folder / name).write_bytes(gzip.compress(b"text") if name.endswith(".gz") else b"text")
    expected = [str(folder / name) for name in ("b.py", "c.C.gz", "e.js")]
    assert find_files([folder]).source_code == expected
    for meant in (find_files([folder], include=["*.py", "*.txt"]), find_files([folder], exclude=["*.txt", "*.md"]),
                  find_files([folder / "a.txt", folder / "b.py"])):  # fmt: skip
        assert meant.source_code == [] and meant.notes() == []
    write_shards.main([*map(str, ["--input", folder, "--tokenizer", byte_tokenizer, "--output", tmp_path / "out"])])
    assert (f"note: 3 files are source code by name (first: {expected[0]}), of 5 that are read: leave them out with "
            "--exclude GLOB, or name with --include GLOB what you mean\n") in capsys.readouterr().out  # fmt: skip
    kept = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert kept["source_code"] == {"count": 3, "first": expected} and "html" not in kept
    assert find_files([folder], exclude=["e.*", "c.*"]).notes()[0].startswith("1 file is source code by name")


@pytest.fixture
def byte_tokenizer(tmp_path) -> Path:
    from tools import train_tokenizer

    (tmp_path / "words.txt").write_text("some words and other words\n" * 99)
    options = ["--input", str(tmp_path / "words.txt"), "--vocab-size", "300"]
    train_tokenizer.main([*options, "--output", str(tmp_path / "t.model")])
    return tmp_path / "t.model"


def test_a_file_named_twice_is_one_input(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    found = find_files(["base", tmp_path / "base", "base/a.txt", "base/../base/a.txt"])
    assert [file.file for file in found.files] == ["base/a.txt"] and len(found.passed_over) == 3


def test_tables_are_read_as_rows_of_the_text_key(tmp_path):
    rows = [{"text": "one, two", "id": "1"}, {"text": "caf\u00e9\nau lait", "id": "2"}, {"text": "", "id": "3"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with open(tmp_path / "b.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "id"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("a.json", "b.csv", "c.json.gz"):
        counts = Counts()
        found = list(read_documents(find_files([tmp_path / name]).files, "text", counts))
        assert [document.text for document in found] == ["one, two", "caf\u00e9\nau lait"]
        assert counts == Counts(documents=2, empty=1)
    assert found[0].source == f"{tmp_path / 'c.json.gz'}, row 1"


def test_bad_rows_are_left_out_when_that_is_wanted_and_named(tmp_path, byte_tokenizer, capsys):
    rows = ['{"text": "one"}', '{"text": ', '{"body": "two"}', '{"text": 3}', '{"text": "four"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    line = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", str(byte_tokenizer)]
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not valid JSON"):
        write_shards.main([*line, "--output", str(tmp_path / "whole")])
    write_shards.main([*line, "--output", str(tmp_path / "out"), "--drop-bad"])
    assert "3 bad rows left out (first: " in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert kept["read"]["documents"] == 2 and kept["bad"]["count"] == kept["inputs"][0]["dropped"]["bad"] == 3
    places = [reason.partition("rows.jsonl, ")[2].partition(":")[0] for reason in kept["bad"]["first"]]
    assert places == ["line 2", "line 3", "line 4"]
    with pytest.raises(ValueError, match=r"holds no text \(0 empty documents, 5 bad rows, the first: .*no field 'txt'"):
        wrong = [*line, "--text-key", "txt", "--drop-bad"]
        write_shards.main([*wrong, "--output", str(tmp_path / "none")])


WRONG = {
    "a.txt": (gzip.compress(b"x"), "holds .gz data, and its name does not say so: run `mv .*a.txt .*a.txt.gz`$"),
    "b.jsonl": (zstandard.compress(b"x"), "holds .zst data, .*run `mv .*b.jsonl .*b.jsonl.zst`$"),
    "c.txt": (b"PK\x03\x04...", "holds .zip data, .*c.txt.zip`, and unpack it"),
    "d.txt": (b"%PDF-1.7", "holds .pdf data"),
    "p.txt": (b"PAR1\x15\x04", "holds .parquet data"),
    "z.txt": (bz2.compress(b"x"), "holds .bz2 data"),
    "e.txt.gz": (b"plain", "holds no .gz data: give it the name of what it is"),
    "f.jsonl.gz.gz": (gzip.compress(gzip.compress(b"{}")), "is compressed twice: run `gunzip -k"),
    "g.txt": ("caf\u00e9".encode("utf-16"), "is UTF-16, not UTF-8: convert it, as with iconv -f UTF-16"),
    "h.csv": ("text\nx".encode("utf-16"), "is UTF-16, not UTF-8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_content_that_is_not_what_its_name_says_is_refused(tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_files([tmp_path / name])


def test_text_that_begins_like_another_kind_is_text(tmp_path):
    for number, text in enumerate(("PAR1 is a gene", "BZh9 is a name", "%PDF- is a mark", "PK is short")):
        (tmp_path / f"{number}.txt").write_text(text)
    assert len(find_files([tmp_path]).files) == 4


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n', encoding="utf-8-sig")
    assert [d.text for d in read_documents(find_files([tmp_path]).files, "text", Counts())] == ["one", "two"]


def test_a_name_that_is_no_text_is_refused_before_any_work(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w", encoding="utf-8") as file:
        file.write("x")
    with pytest.raises(ValueError, match=r"caf.udce9.txt': the name is not UTF-8: rename it, or leave it out"):
        find_files([tmp_path])
    (tmp_path / "fine.txt").write_text("x")
    assert len(find_files([tmp_path], exclude=["caf*"]).files) == 1
