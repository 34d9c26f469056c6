"""The tokenizer: lossless on hard text, special ids, bytes behind each id, clear errors; the tool that trains it."""

import gzip
import hashlib
import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pretrain.prepare.documents import is_held_out
from pretrain.tokenizer.sentencepiece import SPECIAL_PIECES, train
from pretrain.tokenizer.texts import TOKENIZER_NAMES, continues_word
from pretrain.tokenizer.tokenizer import TRICKY_TEXTS, Tokenizer, load_tokenizer
from tests import forked
from tests.data_helpers import python_like_text, spans_by_bytes
from tests.forked import ROOT
from tools import train_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "    ",
    " leading",
    "trailing ",
    "  two  and   three   ",
    "\n",
    "\n\n\n",
    "\ttab\t\tand tab",
    "windows\r\nlines\r\n",
    "old mac\rlines\r",
    "def f(x):\n    if x:\n\treturn  1\n\n\n",
    "nul \0 inside",
    "\0",
    "\0\0a\0",
    "\x01\x1b\x7f control",
    "中文字符，没有空格。",
    "日本語とひらがな",
    "🎉👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈",
    "e\u0301 n\u0303 \u0300alone",
    "\u00e9 composed and e\u0301 decomposed, ﬁ ligature, ① ½ Å",
    "\ufeffbyte order mark",
    "\u00a0\u2003\u3000\u2028\u2029\x85 strange spaces",
    "<s> </s> <pad> <mask> <unk> <cls> <sep>",
    "<s></s><s>",
    "<0x41><0x0A>",
    "\u2047 \u2585 \ufffd",
    "\U0010ffff\U000e0001",
    "1234567890 3.14159 1e-5",
    "العربية עברית हिन्दी ไทย",
    "x" * 5000,
    " " * 5000 + "\n" * 100,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [python_like_text(60, seed) + "year = 2026\n" * 20 for seed in range(40)]
    path.write_bytes(train(texts, vocab_size=700))
    return load_tokenizer(path)


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_lossless_and_every_byte_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.encode_batch([text, "other", text], num_threads=2) == [ids, tokenizer.encode("other"), ids]


def test_spans_are_the_characters_behind_the_ids(tokenizer):
    for text in [*HARD_TEXTS, *TRICKY_TEXTS, python_like_text(200)]:
        text = text.replace("\u2581", " ")
        ids, spans = tokenizer.encode_spans(text)
        assert ids.dtype == spans.dtype == np.int32 and spans.shape == (len(ids), 2)
        assert ids.tolist() == tokenizer.encode(text)
        assert [*map(tuple, spans.tolist())] == spans_by_bytes(text, tokenizer.byte_lengths()[ids])


def test_spans_of_bytes_and_of_the_sign_for_a_space(tokenizer):
    ids, spans = tokenizer.encode_spans("a é\u2581🎉\n")
    assert len(ids) == 10 and spans.tolist() == [[0, 1], [1, 2], *[[2, 3]] * 2, [3, 4], *[[4, 5]] * 4, [5, 6]]


def test_lossless_on_random_text(tokenizer):
    rng = random.Random(0)
    lengths = tokenizer.byte_lengths()
    ranges = [(0, 0x7F), (0, 0x24F), (0x2500, 0x2580), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0x10FFFF)]
    for _ in range(300):
        low, high = rng.choice(ranges)
        text = "".join(rng.choice([chr(rng.randint(low, high)), " ", "\n", "a"]) for _ in range(rng.randint(1, 60)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())


def test_the_one_exception(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_special_ids(tokenizer):
    assert list(tokenizer.special_ids.items()) == [(name, i) for i, name in enumerate(SPECIAL_PIECES)]
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.eos, tokenizer.mask) == ([1], [2], 2, 4)
    assert tokenizer.between == [2]
    assert tokenizer.byte_lengths()[:7].tolist() == [0] * 7
    assert tokenizer.byte_lengths()[7:263].tolist() == [1] * 256
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2, 3, 4, 5, 6]) == "text"
    assert tokenizer.vocab_size == 700


def test_code_pieces_are_learned(tokenizer):
    """Indentation and ends of lines are pieces of their own, so that code stays short; digits stay single."""
    assert len(tokenizer.encode("            ")) <= 3
    assert len(tokenizer.encode(")\n")) == 1
    assert len(tokenizer.encode("2026")) == 4


def test_the_copy_of_a_run_and_of_shards_is_found_by_its_folder(tokenizer, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / tokenizer.file_name).write_bytes(tokenizer.file_bytes)
    for folder in (tmp_path, tmp_path / "train"):
        found = load_tokenizer(folder)
        assert (found.sha256, found.path) == (tokenizer.sha256, tmp_path / "train" / "tokenizer.model")
    assert tokenizer.file_name in TOKENIZER_NAMES and hashlib.sha256(tokenizer.file_bytes).hexdigest() == found.sha256
    with pytest.raises(ValueError, match="train/../gone is not there"):
        load_tokenizer(tmp_path / "train" / ".." / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_which_pieces_continue_a_word(tokenizer):
    text = "def add(first, second_value):\n    return 2026 "
    ids, continues = tokenizer.encode(text), tokenizer.continues_word()
    assert not continues[:7].any()
    for i, id_ in enumerate(ids):
        piece = tokenizer.decode(ids[: i + 1])[len(tokenizer.decode(ids[:i])) :]
        assert continues[id_] == piece[0].isalnum(), piece
    assert any(continues[ids]) and not all(continues[ids])
    chinese = tokenizer.encode("\u4e2d\u6587")  # three bytes each: a character is a word
    assert continues[chinese].tolist() == [False, True, True] * 2
    assert continues[tokenizer.encode("\u0101")].tolist() == [True, True]  # a letter of two bytes


@pytest.mark.parametrize(
    "piece, expected",
    [
        (b"", False), (b"word", True), (b" word", False), (b"9", True), (b"_a", False), (b"(a", False), (b"\n", False),
        ("éa".encode(), True), ("привет".encode(), True), ("한국".encode(), True), ("中文".encode(), False),
        ("の".encode(), False), ("𠀀".encode(), False), ("，".encode(), False), ("\u0301".encode(), True),
        ("🎉".encode(), False), (b"\xa9", True), (b"\xa9 next", True), (b"\xc3", True), (b"\xd7", True),
        (b"\xe4\xb8", False), (b"\xf0\x9f", False),
    ],
)  # fmt: skip
def test_bytes_that_continue_a_word(piece, expected):
    assert continues_word(piece) is expected


def test_transformers_reads_the_export_and_gives_the_same_ids(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizer.hf_files(max_positions=1 << 20).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.model_max_length) == (700, 1 << 20)
    assert {name: getattr(theirs, f"{name}_token_id") for name in SPECIAL_PIECES} == tokenizer.special_ids
    stdlib = [path.read_text()[:20_000] for path in sorted(Path(json.__file__).parent.parent.glob("a*.py"))]
    for text in [*TRICKY_TEXTS, *HARD_TEXTS, *stdlib]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == tokenizer.prefix + ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs(text, "b")["input_ids"] == tokenizer.prefix + ids + tokenizer.between + tokenizer.encode("b")
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("<s> hi")["input_ids"] == tokenizer.prefix + tokenizer.encode("<s> hi")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gone.model is not there: train a tokenizer"):
        load_tokenizer(tmp_path / "gone.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match="text.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")


def test_a_foreign_model_without_the_special_pieces_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([python_like_text(200)]), model_prefix=str(tmp_path / "foreign"), vocab_size=100,
        minloglevel=2, hard_vocab_limit=False, max_sentence_length=100_000,
    )  # fmt: skip
    with pytest.raises(ValueError, match="foreign.model has no piece <pad>"):
        load_tokenizer(tmp_path / "foreign.model")


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        (
            ["some words\n" * 10],
            4000,
            r"a vocabulary of 4000 is too large for this text: use at most \d+, or give more",
        ),
        (["some words\n" * 10], 200, r"a vocabulary of 200 is too small .*: use more than \d+"),
        ([], 1000, "there is no text"),
        (["", "\n"], 1000, "there is no text"),
    ],
)
def test_impossible_vocabularies(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train(texts, vocab_size)


def run(*argv) -> subprocess.CompletedProcess:
    command = forked.program(ROOT / "tools" / "train_tokenizer.py", *argv)
    return subprocess.run(command, cwd=ROOT, env=forked.ENVIRONMENT, timeout=600, capture_output=True, text=True)


def test_the_tool(tmp_path):
    (tmp_path / "in" / "skipped").mkdir(parents=True)
    (tmp_path / "in" / "a.py").write_text(python_like_text(800))
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(python_like_text(800, seed=1).encode(), mtime=0))
    (tmp_path / "in" / "skipped" / "c.py").write_text("\u4e2d" * 1000)
    argv = ["--input", tmp_path / "in", "--exclude", "skipped", "--vocab-size", 600, "--output"]
    done = run(*argv, tmp_path / "out" / "tokenizer.model")
    assert done.returncode == 0, done.stderr
    assert "training 600 pieces on 0.1 MB" in done.stdout and "600 pieces" in done.stdout.splitlines()[-1]
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode("\u4e2d")) == 3  # left out, so only bytes
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tokenizer.model"]

    train_tokenizer.main([*map(str, argv), str(tmp_path / "again.model")])
    assert load_tokenizer(tmp_path / "again.model").sha256 == tokenizer.sha256

    refused = run(*argv, tmp_path / "out" / "tokenizer.model")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "tokenizer.model exists already: delete it" in refused.stderr
    assert load_tokenizer(tmp_path / "out" / "tokenizer.model").sha256 == tokenizer.sha256


def test_the_tool_refuses_what_it_cannot_do(tmp_path):
    (tmp_path / "a.txt").write_text("a few words\n" * 20)
    done = run("--input", tmp_path / "a.txt", "--vocab-size", 9000, "--output", tmp_path / "t.model")
    assert (
        done.returncode == 2 and "a vocabulary of 9000 is too large" in done.stderr and "Traceback" not in done.stderr
    )
    for argv, message in (
        (["--input", tmp_path / "gone", "--vocab-size", 300, "--output", "x"], "gone is not a file or a folder"),
        (["--input", ROOT / "tests", "--include", "*.none", "--vocab-size", 300, "--output", "x"], "matches *.none"),
    ):
        with pytest.raises(ValueError) as error:
            train_tokenizer.main([str(a) for a in argv])
        assert message in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_the_sample_is_spread_over_the_text_and_bounded(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("".join(f"file {i} line {n} with some words in it\n" for n in range(3000)))
    files = train_tokenizer.find_files([tmp_path]).files
    texts = train_tokenizer.sample(files, "text", 200_000, 0.0, train_tokenizer.Counts())
    assert texts == train_tokenizer.sample(files, "text", 200_000, 0.0, train_tokenizer.Counts())
    assert 150_000 < sum(map(len, texts)) < 250_000
    assert all(any(text.startswith(f"file {i} ") for text in texts) for i in range(10))
    everything = train_tokenizer.sample(files, "text", 10**9, 0.0, train_tokenizer.Counts())
    assert "".join(everything) == "".join((tmp_path / f"{i}.txt").read_text() for i in range(10))


def test_pieces_are_whole_lines_where_lines_are_short():
    text = python_like_text(500) + "x" * 20_000 + "\n" + "y\n" * 10
    parts = list(train_tokenizer.pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 4000
    assert all(part.endswith("\n") for part in parts if "x" * 100 not in part)


def test_held_out_documents_teach_it_nothing(tool, tmp_path):
    """A word that is frequent in one document only becomes a piece exactly when that document is trained on."""
    words = [hashlib.sha256(bytes([i])).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))[:12]
             for i in range(60)]  # fmt: skip
    documents = [f"{word} and {word}\n" * 50 for word in words]
    source, output = tmp_path / "text.jsonl", tmp_path / "t.model"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tool("train_tokenizer.py", "--input", source, "--vocab-size", "900", "--output", output, "--val-fraction", "0.2")
    tokenizer = load_tokenizer(output)
    held_out = [is_held_out(text.encode(), 0.2) for text in documents]
    assert 3 < sum(held_out) < 30
    for word, left_out in zip(words, held_out, strict=True):
        assert (len(tokenizer.encode(f" {word}")) > 2) == left_out
