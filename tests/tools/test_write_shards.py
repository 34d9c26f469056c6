"""tools/write_shards.py: every kind of input, splits, exact tokens, interruptions, refusals."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pretrain.cli import STOPPED
from pretrain.prepare import encode
from pretrain.prepare.documents import Counts, is_held_out, read_documents
from pretrain.prepare.finding import find_files
from pretrain.shards import manifest as manifests
from pretrain.shards.writer import DatasetWriter
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests import forked
from tests.data_helpers import python_like_text
from tests.forked import ROOT
from tools import write_shards


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train([python_like_text(60, seed) for seed in range(40)], vocab_size=700))
    return load_tokenizer(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 documents of several kinds."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    for i in range(20):
        (root / "sub" / f"{i:02d}.py").write_text(python_like_text(40 + i, seed=i))
    (root / "a.txt").write_text("windows\r\n中文 \0 🎉\n")
    (root / "b.md.gz").write_bytes(gzip.compress(b"# packed with gzip\n"))
    (root / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"packed with zstd\n"))
    lines = [json.dumps({"text": f"record {i} \ud83c\udf89"}) for i in range(10)]
    (root / "d.jsonl").write_text("\n".join(lines[:5]) + "\n\n")
    (root / "e.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[5:]).encode()))
    for i in range(7):
        (root / f"z{i}.txt").write_text(f"short text {i}\n")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def tool(*argv) -> None:
    write_shards.main([str(a) for a in argv])


def documents(manifest: manifests.Manifest) -> list[list[int]]:
    """Every document of a data set, read from the bytes of its shards."""
    found = []
    for i, shard in enumerate(manifest.shards):
        data = (manifest.folder / shard.name).read_bytes()
        for chunk in manifest.chunks(i):
            tokens = np.frombuffer(data, "<u2", int(chunk["tokens"]), int(chunk["tokens_offset"]))
            starts = np.frombuffer(data, "<i4", int(chunk["docs"]), int(chunk["docs_offset"]))
            head, *rest = np.split(tokens, starts)
            if len(head):
                found[-1] += head.tolist()
            found += [part.tolist() for part in rest]
    return found


def test_every_document_arrives_in_order(folder, tokenizer, tmp_path, capsys):
    tool("--input", folder, "--tokenizer", tokenizer.path, "--output", tmp_path / "out", "--chunk-tokens", 500)
    manifest = manifests.load(tmp_path / "out")
    expected = ["windows\r\n中文 \0 🎉\n", "# packed with gzip\n", "packed with zstd\n"]
    expected += [f"record {i} 🎉" for i in range(10)]
    expected += [f"short text {i}\n" for i in range(7)]
    expected += [python_like_text(40 + i, seed=i) for i in range(20)]
    found = documents(manifest)
    assert [tokenizer.decode(tokens[1:-1]) for tokens in found] == expected
    assert found == [[*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix] for text in expected]
    assert manifest.docs == 40 and manifest.text_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.tokens == sum(map(len, found))
    assert manifest.tokenizer_sha256 == tokenizer.sha256 == load_tokenizer(manifest.tokenizer_path).sha256
    assert (manifest.vocab_size, manifest.dtype, manifest.special_ids) == (700, "<u2", tokenizer.special_ids)
    text = capsys.readouterr().out
    assert f"out: 40 documents, {manifest.text_bytes / 1e6:,.1f} MB of text, {manifest.tokens:,} tokens" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_the_same_bytes_every_time(folder, tokenizer, tmp_path, monkeypatch):
    argv = ["--input", folder, "--tokenizer", tokenizer.path, "--chunk-tokens", 500, "--shard-mb", 0.003]
    tool(*argv, "--output", tmp_path / "a", "--threads", 1)
    tool(*argv, "--output", tmp_path / "b", "--threads", 3)
    monkeypatch.setattr(encode, "BATCH_CHARS", 2000)
    tool(*argv, "--output", tmp_path / "c")
    monkeypatch.undo()
    tool(*argv, "--output", tmp_path / "d", "--workers", 2)
    tool(*argv, "--output", tmp_path / "e", "--workers", 4)
    expected = contents(tmp_path / "a")
    assert len([name for name in expected if name.endswith(".tar")]) > 5
    for other in "bcde":
        assert contents(tmp_path / other) == expected, other


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_part_is_what_one_writer_writes(folder, tokenizer, tmp_path):
    """The shards of a small input are those of DatasetWriter, bit for bit."""
    tool("--input", folder, "--tokenizer", tokenizer.path, "--output", tmp_path / "out", "--chunk-tokens", 500)
    manifest = manifests.load(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    writer = DatasetWriter(tmp_path / "plain", "<u2", 500, 1 << 20)
    for document in documents(manifest):
        writer.add(np.array(document), len(tokenizer.decode(document[1:-1]).encode()))
    writer.finish(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids)
    for name, data in contents(tmp_path / "plain").items():
        assert (tmp_path / "out" / name).read_bytes() == data, name
    assert sorted(contents(tmp_path / "out")) == [
        "00000000.idx.npy", "00000000.tar", "index.json", "inputs.json", "tokenizer.model",
    ]  # fmt: skip


def test_the_split_is_by_text(folder, tokenizer, tmp_path):
    for i in range(20):  # a copy of every file under another name
        (folder / f"copy-{i}.py").write_text(python_like_text(40 + i, seed=i))
    argv = ["--input", folder, "--tokenizer", tokenizer.path, "--val-fraction", 0.3]
    tool(*argv, "--output", tmp_path / "out")
    train_set = manifests.open_split(tmp_path / "out", "train")
    val_set = manifests.open_split(tmp_path / "out", "val")
    in_train, in_val = (set(map(tuple, documents(m))) for m in (train_set, val_set))
    assert not in_train & in_val and len(in_train | in_val) == 40
    assert train_set.docs + val_set.docs == 60 and 4 <= len(in_val) <= 20
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["inputs.json", "train", "val"]
    with pytest.raises(ValueError, match="holds a finished data set: delete it"):
        tool(*argv, "--output", tmp_path / "out")


def test_the_split_is_pinned():
    """Held-out text stays held out when the shards are written again by a later version."""
    held_out = [i for i in range(60) if is_held_out(f"document {i}".encode(), 0.1)]
    assert held_out == [9, 11, 20, 47]


def test_long_documents_are_tokenized_in_pieces(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARS", 300)
    text = python_like_text(200) + "x" * 1000 + "\n\ntail"
    parts = encode.cut(text)
    assert "".join(parts) == text and max(map(len, parts)) <= 300 and len(parts) > 10
    assert [encode.cut(t) for t in ("", "short")] == [[""], ["short"]]
    (tmp_path / "long.txt").write_text(text)
    tool("--input", tmp_path / "long.txt", "--tokenizer", tokenizer.path, "--output", tmp_path / "out")
    (tokens,) = documents(manifests.load(tmp_path / "out"))
    assert tokenizer.decode(tokens[1:-1]) == text
    lengths = tokenizer.byte_lengths()
    assert lengths[tokens].sum() == len(text)


def test_files_of_a_folder(folder):
    def names(**choice):
        return [file.path.relative_to(folder).as_posix() for file in find_files([folder], **choice).files]

    assert names(include=["*.md.gz", "d.*"]) == ["b.md.gz", "d.jsonl"]
    assert names(include=["sub/0[01].py"]) == names(include=["0[01].py"]) == ["sub/00.py", "sub/01.py"]
    assert names(exclude=["sub", "z*"]) == ["a.txt", "b.md.gz", "c.txt.zst", "d.jsonl", "e.jsonl.gz"]
    assert "picture.png" not in names() and names() == sorted(names(), key=lambda n: ("/" in n, n))
    assert [f.path for f in find_files([folder / "picture.png", folder / "a.txt", folder / "a.txt"]).files] == [
        folder / "picture.png",
        folder / "a.txt",
    ]


def read(path: Path, text_key: str = "text") -> tuple[list[str], Counts]:
    counts = Counts()
    return [d.text for d in read_documents(find_files([path]).files, text_key, counts)], counts


def test_bad_characters_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "half \\ud83c"}\n{"text": "\xff"}\n{"text": ""}\n{"text": "\xc3\xa9"}\n'
    )
    texts, counts = read(tmp_path)
    assert texts == ["caf\ufffd", "half \ufffd", "\ufffd", "é"]
    assert (counts.documents, counts.invalid, counts.empty) == (4, 3, 1)
    assert "3 documents with invalid UTF-8" in counts.summary() and "a.txt" in counts.summary()


def test_all_bytes_of_input_are_reported(folder):
    (folder / "e.jsonl.gz").unlink()  # read in blocks, and its last bytes bring no document
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": "x" * i}) + "\n" for i in range(1, 40)))
    files = find_files([folder]).files
    assert sum(d.input_bytes for d in read_documents(files, "text", Counts())) == sum(f.bytes for f in files)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: not valid JSON"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 3}\n',
            r"a.jsonl, line 1: no field 'text' \(there is: body, id\).*--text-key",
        ),
        ("a.jsonl", b'["x"]\n', r"a.jsonl, line 1: no field 'text' \(there is: list\)"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl, line 1: field 'text' is not text"),
        ("a.txt.gz", gzip.compress(b"x" * 100_000)[:-20], r"a.txt.gz is damaged or cut short"),
        ("a.txt.gz", b"not packed at all", r"a.txt.gz holds no .gz data: give it the name of what it is"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-9], r"a.jsonl.gz is damaged or cut short"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(os.urandom(300_000))[:-20], r"a.txt.zst is damaged or cut"),
        ("a.txt.zst", b"not packed at all", r"a.txt.zst holds no .zst data"),
    ],
)
def test_input_that_cannot_be_read(name, data, message, tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        tool("--input", tmp_path / "in", "--tokenizer", tokenizer.path, "--output", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_two_frames_and_large_zstd(tmp_path):
    part = os.urandom(300_000).hex()
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(compress(part.encode()) + compress(b"") + compress(b"tail"))
    assert read(tmp_path / "a.txt.zst")[0] == [part + "tail"]


def test_refusals_on_the_command_line(folder, tokenizer, tmp_path):
    def refused(*argv, output=tmp_path / "out") -> str:
        command = forked.program(ROOT / "tools" / "write_shards.py", "--output", output, *argv)
        done = subprocess.run(command, env=forked.ENVIRONMENT, timeout=600, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    model = ["--tokenizer", tokenizer.path]
    assert "gone.model is not there" in refused("--input", folder, "--tokenizer", tmp_path / "gone.model")
    assert "no.txt is not a file or a folder" in refused("--input", tmp_path / "no.txt", *model)
    assert "must be at least 0 and below 1" in refused("--input", folder, *model, "--val-fraction", "1.5")
    single = folder / "a.txt"
    assert "leaves 1 to train on and 0 held out" in refused("--input", single, *model, "--val-fraction", "0.0001")
    (tmp_path / "empty.txt").write_text("")
    assert "the input holds no text (1 empty documents)" in refused("--input", tmp_path / "empty.txt", *model)
    assert "in exists and is not an empty folder" in refused("--input", folder, *model, output=folder)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert not (folder / "index.json").exists()


def start_slow(folder, tokenizer, output) -> subprocess.Popen:
    """The tool as a process that stops to wait in the middle of its third part."""
    program = (
        "import sys, time; from tools import write_shards as w; from pretrain.prepare import parts\n"
        "real = parts.encode; count = 0\n"
        "def encode(*a):\n"
        "    global count\n"
        "    for item in real(*a):\n"
        "        yield item; count += 1\n"
        "        if count == 33: print('waiting', flush=True); time.sleep(60)\n"
        "parts.encode = encode; w.run_tool(lambda: w.main(sys.argv[1:]))"
    )
    argv = ["--input", folder, "--tokenizer", tokenizer.path, "--output", output, "--shard-mb", "0.003"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, argv), "--chunk-tokens", "500"],
        env=forked.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("note: passed over: 1 of a kind that is not read (.png 1")
    assert process.stdout.readline().startswith("note: 20 files are source code by name (first: ")
    assert process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_from_its_finished_parts(folder, tokenizer, tmp_path, capsys, signal_number):
    output = tmp_path / "out"
    process = start_slow(folder, tokenizer, output)
    parts = tmp_path / ".out.write_shards-partial" / "parts"
    finished = {path: path.stat() for path in sorted(parts.glob("?????/*.tar"))}
    assert {path.parent.name for path in finished} == {"00000", "00001", "00002"} and list(parts.glob("00003.*"))
    argv = ["--input", folder, "--tokenizer", tokenizer.path, "--shard-mb", 0.003, "--chunk-tokens", 500]
    with pytest.raises(ValueError, match="another write_shards.py is writing"):
        tool(*argv, "--output", output)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else STOPPED)
    assert "Traceback" not in errors and not output.exists()
    assert ("3 finished parts stay in" in errors) == (signal_number != signal.SIGKILL)
    assert bool(list(parts.glob("00003.*"))) == (signal_number == signal.SIGKILL)

    tool(*argv, "--output", output)
    count = len(json.loads((output / "inputs.json").read_text())["inputs"])
    assert count > 20 and "going on: 3 of " in capsys.readouterr().out
    tool(*argv, "--output", tmp_path / "calm")
    assert contents(output) == contents(tmp_path / "calm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "in", "out"]
    for number, before in enumerate(finished.values()):  # moved, not written again
        now = (output / f"{number:08d}.tar").stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_memory_is_flat_in_the_size_of_the_corpus(tokenizer, tmp_path):
    """Ten times the documents (1 and 13 MB of text), the same peak memory within 6 MB."""
    program = (
        "import resource, sys; from tools import write_shards as w; w.main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    body = python_like_text(600)
    for name, count in (("small", 1), ("large", 10)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for i in range(count * 60):
                file.write(json.dumps({"text": f"# {i}\n{body}"}) + "\n")
        argv = ["--input", tmp_path / f"{name}.jsonl", "--tokenizer", tokenizer.path, "--output", tmp_path / name,
                "--threads", 1, "--shard-mb", 0.5]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, argv)],
            env=forked.ENVIRONMENT, timeout=600, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 6, peaks


def test_a_full_disk(folder, tokenizer, tmp_path):
    """A limit on the size of a file stands for a full disk: both fail a write in the middle."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from tools import write_shards as w; w.run_tool(lambda: w.main(sys.argv[1:]))"
    )
    for i in range(20):
        (folder / f"more-{i}.py").write_text(python_like_text(40, seed=100 + i))
    argv = ["--input", folder, "--tokenizer", tokenizer.path, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, *map(str, argv)],
        env=forked.ENVIRONMENT, timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    wanted = f"no room for {tmp_path / 'out'} (File too large): about 1 MB more are needed; nothing is kept"
    assert wanted in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
