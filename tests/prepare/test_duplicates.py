"""The report names where a duplicate and the earlier copy of it lie, in every kind of file, whoever did which part."""

import csv
import json
import random
from pathlib import Path

import pytest

from pretrain.prepare import staging
from pretrain.prepare.filters import MAX_EXAMPLES
from pretrain.tokenizer.sentencepiece import train
from tests.data_helpers import python_like_text
from tests.prepare.test_documents import write_tar
from tools import write_shards

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

SMALL = ["--shard-mb", "0.001"]  # a part is 2,096 bytes: JSONL files are cut into many ranges


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train([python_like_text(60, seed) for seed in range(40)], vocab_size=700))
    return path


def words(seed: int, count: int = 100) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(count))


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Originals in five kinds of files, among what is empty, too short or no text; then, in z.jsonl, their copies."""
    root = tmp_path / "in"
    root.mkdir()
    lines = [line(words(seed)) for seed in range(20)]
    lines[3], lines[4], lines[9] = "\n", line(""), line("short")
    (root / "a.jsonl").write_text("".join(lines))
    with open(root / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, words(30)], [2, ""], [3, words(31)]])
    parquet.write_table(pyarrow.table({"text": [words(40), None, words(41)]}), root / "c.parquet")
    members = [("x/0.txt", words(50)), ("x/0.json", "{}"), ("x/1.txt", words(51))]
    write_tar(root / "d.tar", [(name, text.encode()) for name, text in members])
    (root / "e.txt").write_text(words(60))
    write_copies(root)
    return root


def write_copies(root: Path, ending: str = "") -> None:
    """A blank line after each."""
    seeds = (17, 31, 41, 51, 60, 0, 1)
    (root / "z.jsonl").write_text("\n".join(line(words(seed) + ending) for seed in seeds))


def prepare(folder: Path, tokenizer: Path, output: Path, *more: str) -> dict:
    argv = ["--input", folder / "b.csv", folder, "--tokenizer", tokenizer, "--output", output, "--min-chars", 10, *more]
    write_shards.main([str(a) for a in argv])
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("cut", [SMALL, []], ids=["many parts", "one part"])
@pytest.mark.parametrize("kind", ["exact", "near"])
def test_both_places_are_named_in_every_kind_of_file(folder, tokenizer, tmp_path, capsys, kind, cut):
    write_copies(folder, " again" if kind == "near" else "")
    report = prepare(folder, tokenizer, tmp_path / "out", "--dedup", kind, *cut)
    found = report["dropped"][f"{kind}_duplicate"]
    assert [(example["source"], example["detail"]) for example in found["examples"]] == [
        (f"{folder}/z.jsonl, line 1", f"like {folder}/a.jsonl, line 18"),
        (f"{folder}/z.jsonl, line 3", f"like {folder}/b.csv, line 4"),
        (f"{folder}/z.jsonl, line 5", f"like {folder}/c.parquet, row 3"),
        (f"{folder}/z.jsonl, line 7", f"like {folder}/d.tar, member x/1.txt"),
        (f"{folder}/z.jsonl, line 9", f"like {folder}/e.txt"),
    ]
    assert all(set(example) == {"source", "text", "detail"} for example in found["examples"])
    assert found["documents"] == 7 > len(found["examples"]) == MAX_EXAMPLES
    named = f"first: {folder}/z.jsonl, line 1 (like {folder}/a.jsonl, line 18)"
    assert named in capsys.readouterr().out


def test_the_places_are_those_of_now_where_parts_of_before_are_kept(folder, tokenizer, tmp_path, monkeypatch):
    """A run is interrupted when all parts are finished; then a file before them changes, which moves the numbers."""

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    argv = [folder, tokenizer, tmp_path / "out", "--dedup", "near", *SMALL]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "assemble", interrupted)
        prepare(*argv)
    parts = tmp_path / ".out.write_shards-partial" / "parts"
    before = {path.name: (path / "done.json").stat().st_mtime_ns for path in parts.iterdir()}
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    lines[1] = line(lines[1][10:200]) + line(lines[1][200:-3])  # two documents of one; what is after them stays
    (folder / "a.jsonl").write_text("".join(lines))
    kept = {}
    assemble = staging.assemble

    def noted(plan, *others):
        kept.update({path.name: (path / "done.json").stat().st_mtime_ns for path in parts.iterdir()})
        return assemble(plan, *others)

    monkeypatch.setattr(staging, "assemble", noted)
    report = prepare(*argv)
    assert set(before.items()) & set(kept.items())
    monkeypatch.undo()
    argv[2] = tmp_path / "fresh"
    assert report == prepare(*argv)
    first = report["dropped"]["near_duplicate"]["examples"][0]
    assert first["detail"] == f"like {folder}/a.jsonl, line 19"
