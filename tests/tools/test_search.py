"""Vectors are the model's, an index finds by them and belongs to its weights; the tool cuts, writes, finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint.load import load_model
from pretrain.config import compose
from pretrain.tasks.text_vectors import embed_texts
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.models import SMALL, write_weights

faiss = pytest.importorskip("faiss")
from pretrain.inference.vectors import Index, write_index  # noqa: E402
from tools import search  # noqa: E402

TEXTS = ["import os", "", "def parse(self, message):\n    return None", "é 漢🙂", "class A: pass " * 40]


def vectors_one_by_one(model, tokenizer, texts: list[str], pool) -> np.ndarray:
    rows = [[*tokenizer.prefix, *tokenizer.encode(text)][:24] or tokenizer.suffix for text in texts]
    return np.stack([pool(model, torch.tensor([row]))[0].numpy() for row in rows])


def mean_of_hidden_states(model, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(model.trunk(tokens).mean(1), dim=-1)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """Folders of weights: of a language model, and of one with the head `embedding`, both causal; other weights."""
    root = tmp_path_factory.mktemp("models")
    last = ["model.head=embedding", "model.pooling=last"]
    for name, head, seed in (("lm", [], 0), ("tuned", last, 0), ("other", last, 1)):
        config = compose.compose("pretrain", [*SMALL, "model.vocab_size=512", *head]).model
        write_weights(root / name, config, 5, seed)
        shutil.copy(shards / "train" / "tokenizer.model", root / name)
    return root


@pytest.mark.parametrize(("name", "pool"), [("lm", mean_of_hidden_states), ("tuned", lambda model, row: model(row))])
def test_vectors_of_a_batch_are_those_of_each_text_alone(runs, name, pool):
    model, tokenizer = load_model(runs / name), load_tokenizer(runs / name)
    done = []
    found = embed_texts(model, tokenizer, TEXTS, max_tokens=24, batch_size=3, on_texts=done.append)
    assert found.dtype == np.float32 and done == [3, 2]
    assert np.allclose(found, vectors_one_by_one(model, tokenizer, TEXTS, pool), atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_an_index_finds_the_nearest_by_inner_product(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    passages = [{"text": f"passage {number}\u2028 é"} for number in range(50)]
    write_index(tmp_path, vectors, passages, {"model": "m"})
    index = Index(tmp_path)
    assert index.facts == {"model": "m", "passages": 50}
    queries = vectors[:3] + 0.1
    for query, rows in zip(queries, index.search(queries, 4), strict=True):
        order = np.argsort(-(vectors @ query))[:4]
        assert [row["text"] for row in rows] == [passages[number]["text"] for number in order]
        assert [row["score"] for row in rows] == pytest.approx((vectors @ query)[order].tolist(), rel=1e-5)
    assert len(index.search(queries, 99)[0]) == 50


def test_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no index"):
        Index(tmp_path)
    write_index(tmp_path, np.ones((2, 4), np.float32), [{"text": "a"}, {"text": "b"}], {})
    whole = (tmp_path / "vectors.faiss").read_bytes()
    damages = (("vectors.faiss", whole[:-3]), ("vectors.faiss", b""), ("passages.jsonl", b'{"text": "a"}\n'))
    for name, content in damages:
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            Index(tmp_path)
        (tmp_path / name).write_bytes(kept)
    assert Index(tmp_path).facts["passages"] == 2


def test_the_tool_makes_an_index_and_finds_a_passage_by_its_own_text(runs, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    index = tmp_path / "my.index"
    model = str(runs / "tuned")
    search.main([model, "--texts", str(texts), "--text-key", "body", "--index", str(index), "--max-tokens", "24"])
    passages = [json.loads(line) for line in (index / "passages.jsonl").read_text().splitlines()]
    assert "passages of at most 24 tokens, 64 numbers each" in capsys.readouterr().out
    tokenizer = load_tokenizer(runs / "tuned")
    assert all(len(tokenizer.encode(passage["text"])) <= 24 for passage in passages)
    assert len([p for p in passages if p["source"] == f"{texts}, line 5"]) > 3
    joined = "".join("".join(passage["text"].split()) for passage in passages)
    assert joined == "".join("".join(text.split()) for text in TEXTS)  # every text, each character once
    search.main([model, "--index", str(index), "--query", TEXTS[0], "--top", "2"])
    first = capsys.readouterr().out.splitlines()[2]
    assert first.split()[:2] == ["1", "1.000"] and f"{texts}, line 1" in first

    queries, output = tmp_path / "queries.jsonl", tmp_path / "found.jsonl"
    queries.write_text("".join(json.dumps({"query": passage["text"]}) + "\n" for passage in passages))
    search.main([model, "--index", str(index), "--queries", str(queries), "--output", str(output), "--top", "1"])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [entry["query"] for entry in found] == [passage["text"] for passage in passages]
    assert all(entry["results"][0]["text"] == entry["query"] for entry in found)


def test_the_tool_reads_a_folder_of_texts(runs, tmp_path, capsys):
    for name, text in (("a.txt", "import os"), ("sub/b.md", "class A: pass")):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    line = [str(runs / "tuned"), "--index", str(tmp_path / "index")]
    search.main([*line, "--texts", str(tmp_path / "texts")])
    assert "2/2" in capsys.readouterr().err
    search.main([*line, "--query", "class A: pass", "--top", "1"])
    found = capsys.readouterr().out
    assert f"1.000  {tmp_path}/texts/sub/b.md" in found and "a.txt" not in found


def test_columns_of_the_table_are_shown_with_what_is_found(runs, tmp_path, capsys):
    index, found = tmp_path / "my.index", tmp_path / "found.jsonl"
    line = [str(runs / "tuned"), "--index", str(index)]
    rows = [
        {"text": "import os", "title": "The  os\nmodule " + "x" * 400, "tags": ["a", 1], "other": "unseen"},
        {"text": "class A: pass", "tags": None}, {"text": None, "title": "nothing"}, {"title": "nothing"}, {"text": ""},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    search.main([*line, "--texts", str(tmp_path / "a.jsonl"), "--show", "tags, title"])
    search.main([*line, "--query", "import os"])
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"   1   1.000  {tmp_path}/a.jsonl, line 1", '      tags: ["a", 1]',
        f"      title: The os module {'x' * (300 - len('The os module '))}…", "      import os",
        f"   2 {json.loads(lines_of(line, found)[0])['results'][1]['score']:7.3f}  {tmp_path}/a.jsonl, line 2",
        "      tags: null", "      class A: pass",
    ]  # fmt: skip
    results = json.loads(lines_of(line, found)[0])["results"]
    assert [row["columns"] for row in results] == [{"tags": ["a", 1], "title": rows[0]["title"]}, {"tags": None}]
    results = json.loads(lines_of([*line, "--show", "title"], found)[0])["results"]
    assert [row["columns"] for row in results] == [{"title": rows[0]["title"]}, {}]


def lines_of(line: list[str], output: Path) -> list[str]:
    search.main([*line, "--query", "import os", "--output", str(output)])
    return output.read_text().splitlines()


def test_an_unknown_column_is_refused_before_any_work(runs, tmp_path):
    """No model is there, and none is missed."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "import os", "title": "os", "url": "x"}) + "\n")
    make = ["--texts", str(tmp_path / "a.jsonl"), "--index", str(tmp_path / "index")]
    there = r"a.jsonl has no column 'titel' \(did you mean 'title'\?\): there is text, title, url; .* --show="
    with pytest.raises(ValueError, match=there):
        search.main([str(tmp_path / "no model"), *make, "--show", "url,titel"])
    with pytest.raises(ValueError, match="a.jsonl has no column 'body': there is text, title, url; .* --text-key="):
        search.main([str(tmp_path / "no model"), *make, "--show", "url", "--text-key", "body"])
    for wrong in ("", "a,,b"):
        with pytest.raises(SystemExit):
            search.main([str(runs / "tuned"), *make, "--show", wrong])
    search.main([str(runs / "tuned"), *make, "--show", "url,title"])
    kept = r"keeps no column 'text' \(there is: url, title\): it keeps those that --show names when it is made"
    with pytest.raises(ValueError, match=kept):
        search.main([str(tmp_path / "no model"), "--index", str(tmp_path / "index"), "--query", "x", "--show", "text"])
    make[-1] += "2"
    search.main([str(runs / "tuned"), *make])
    with pytest.raises(ValueError, match=r"'url' \(there is: none\)"):
        search.main([str(runs / "tuned"), *make[2:], "--query", "x", "--show", "url"])


def test_an_index_of_other_weights_is_refused(runs, tmp_path):
    index, tuned, texts = str(tmp_path / "index"), str(runs / "tuned"), ["--texts", str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text("import os")
    search.main([tuned, *texts, "--index", index])
    with pytest.raises(ValueError, match="made with other weights"):
        search.main([str(runs / "other"), "--index", index, "--query", "x"])
    with pytest.raises(ValueError, match="exists already"):
        search.main([str(runs / "other"), *texts, "--index", index])
    with pytest.raises(ValueError, match="there is no folder"):
        search.main([tuned, "--index", index, "--query", "x", "--output", str(tmp_path / "gone" / "out.jsonl")])
    with pytest.raises(ValueError, match="no room"):
        search.main([tuned, *texts, "--index", index + "2", "--max-tokens", "1"])
    assert not (tmp_path / "index2").exists()
    for wrong in ([], ["--query", "x", "--texts", "y"], ["--query", "x", "--top", "0"]):
        with pytest.raises(SystemExit):
            search.main([tuned, "--index", index, *wrong])
