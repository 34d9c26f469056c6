"""tools/verify_shards.py: good shards pass, all faults are listed, tars of others are indexed, unsafe ones refused."""

import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.shards import manifest as manifests
from pretrain.shards import sidecar, tar
from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import ShardReader
from pretrain.shards.rebuild import rebuild
from pretrain.shards.sidecar import CONTINUES, WHOLE
from pretrain.shards.writer import DatasetWriter
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data_helpers import python_like_text
from tools.verify_shards import main

TEXT = python_like_text(2500)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train([TEXT[i : i + 1000] for i in range(0, 20_000, 1000)], 400))
    return load_tokenizer(path)


def texts(count: int, longest: int = 3000) -> list[str]:
    return [TEXT[i * 100 : i * 100 + 50 + i * 977 % longest] for i in range(count)]


def write(folder: Path, tokenizer: Tokenizer, documents: list[str], chunk: int = 700, shard: int = 5000) -> Manifest:
    """A data set of texts, with its tokenizer."""
    folder.mkdir(parents=True)
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    writer = DatasetWriter(folder, "<u2", chunk, shard)
    for text in documents:
        writer.add(np.array([*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]), len(text.encode()))
    return writer.finish(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids)


@pytest.fixture
def dataset(tmp_path, tokenizer) -> Manifest:
    manifest = write(tmp_path / "data", tokenizer, texts(30))
    assert len(manifest.shards) >= 3 and len(manifest.chunks(1)) >= 3
    return manifest


def run(capsys, *argv: str | Path) -> tuple[int, list[str]]:
    """Exit status and what was printed."""
    status = 0
    capsys.readouterr()
    try:
        main([str(arg) for arg in argv])
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out.splitlines()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- verifying ---


@pytest.mark.parametrize("flags", [(), ("--deep",)])
def test_good_shards(dataset, tokenizer, capsys, tmp_path, flags):
    line = f"{dataset.folder}: {len(dataset.shards)} shards, {dataset.tokens:,} tokens, all good"
    assert run(capsys, dataset.folder, *flags) == (0, [line])
    write(tmp_path / "both" / "val", tokenizer, texts(3))
    dataset.folder.rename(tmp_path / "both" / "train")
    status, lines = run(capsys, tmp_path / "both", *flags)
    assert status == 0 and [line.split(": ")[0] for line in lines] == [f"{tmp_path}/both/{x}" for x in ("train", "val")]
    assert lines[1].split(": ")[1].startswith("1 shard, ")


def test_a_text_with_the_sign_for_spaces_is_no_fault(tmp_path, tokenizer, capsys):
    """The tokenizer reads U+2581 as a space: its tokens stand for two bytes less."""
    write(tmp_path / "data", tokenizer, [*texts(3), "a\u2581b\u2581" * 100])
    assert run(capsys, tmp_path / "data", "--deep")[0] == 0


def test_all_faults_are_listed(dataset, capsys):
    folder = dataset.folder
    with open(folder / "00000000.tar", "r+b") as file:
        for chunk in (0, 2):
            file.seek(int(dataset.chunks(0)["tokens_offset"][chunk]))
            file.write(b"\xff\xff\xff\xff")
    os.truncate(folder / "00000001.tar", int(dataset.chunks(1)["offset"][2]) + 5)
    (folder / "00000002.tar").unlink()
    (folder / "00000000.idx.npy").write_bytes((folder / "00000000.idx.npy").read_bytes()[:-1] + b"\x01")
    (folder / "tokenizer.model").write_bytes(b"x")
    (folder / "more.tar").write_bytes(b"x")
    status, lines = run(capsys, folder)
    assert status == 1
    expected = [
        "tokenizer.model is damaged: sha256 2d711642b726 where index.json says ",
        "00000000.idx.npy is damaged: sha256 ", "00000000.tar: sha256 is ", "00000001.tar: it has ",
        *(f"00000001.tar, chunk {i:08d}: the file ends before the end of this chunk"
          for i in range(2, len(dataset.chunks(1)))),
        "00000001.tar: sha256 is ", "00000002.tar: it is missing, index.json lists it",
    ]  # fmt: skip
    for line, start in zip(lines, expected, strict=False):
        assert line.startswith(f"{folder}/{start}")
    assert lines[len(expected) :] == [
        "note: index.json does not list more.tar: --rebuild takes them in",
        f"{folder}: {len(expected)} faults: copy these files again; where only index.json or a .idx.npy is damaged, "
        "--rebuild mends it",
    ]


def test_chunks_are_named(dataset, capsys):
    chunks = dataset.chunks(1)
    with open(dataset.folder / "00000001.tar", "r+b") as file:
        for chunk in (0, 2):
            file.seek(int(chunks["tokens_offset"][chunk]))
            file.write(b"\xff\xff\xff\xff")
    for flags in ((), ("--deep",)):
        status, lines = run(capsys, dataset.folder, *flags)
        assert status == 1 and len(lines) == 4
        for line, chunk in zip(lines, (0, 2), strict=False):
            assert line.startswith(f"{dataset.folder}/00000001.tar, chunk {chunk:08d}: crc32 is ")
            assert line.endswith(f", expected {chunks['crc32'][chunk]:08x}")


def consistent(dataset: Manifest, shard: int, changed: bytes | None = None, **index) -> None:
    """Give changed shards and sidecars right hashes: a data set that was written wrongly, not damaged."""
    folder, entry = dataset.folder, dataset.shards[shard]
    data = (folder / entry.name).read_bytes()
    chunks = dataset.chunks(shard)
    for chunk in chunks:
        chunk["crc32"] = zlib.crc32(data[chunk["offset"] : chunk["offset"] + chunk["bytes"]])
    for name, (row, value) in index.pop("rows", {}).items():
        chunks[name][row] = value
    table = sidecar.to_bytes(chunks)
    (folder / sidecar.sidecar_name(entry.name)).write_bytes(table)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": hashlib.sha256(table).hexdigest(), **index}
    shards = list(dataset.shards)
    shards[shard] = replace(entry, **facts)
    manifests.save(replace(dataset, shards=tuple(shards)), folder)


def patch(dataset: Manifest, shard: int, offset: int, numbers: np.ndarray) -> None:
    with open(dataset.folder / dataset.shards[shard].name, "r+b") as file:
        file.seek(int(offset))
        file.write(numbers.tobytes())


def fault_token(dataset):
    patch(dataset, 1, dataset.chunks(1)["tokens_offset"][1], np.array([400], "<u2"))
    consistent(dataset, 1)


def fault_docs_order(dataset):
    chunks = dataset.chunks(0)
    row = int(np.flatnonzero(chunks["docs"] >= 2)[0])
    patch(dataset, 0, chunks["docs_offset"][row], np.array([9, 9], "<i4"))
    consistent(dataset, 0)


def fault_docs_beyond(dataset):
    chunks = dataset.chunks(0)
    patch(dataset, 0, chunks["docs_offset"][0] + 4 * (chunks["docs"][0] - 1), np.array([700], "<i4"))
    consistent(dataset, 0)


def fault_continues(dataset):
    consistent(dataset, 0, rows={"flags": (0, CONTINUES)})


def fault_moved(dataset):
    """A table that is right in itself, but not what the tar says."""
    consistent(dataset, 0, rows={"tokens_offset": (1, dataset.chunks(0)["tokens_offset"][1] - 2)})


def fault_text_bytes(dataset):
    consistent(dataset, 0, text_bytes=dataset.shards[0].text_bytes - 1)


def fault_not_full(dataset):
    manifests.save(replace(dataset, full_chunks=False), dataset.folder)


def fault_vocabulary(dataset):
    manifests.save(replace(dataset, vocab_size=401), dataset.folder)


def fault_member(dataset):
    """A header changed, its checksum and the crc32 made right."""
    path = dataset.folder / "00000000.tar"
    data = path.read_bytes()
    path.write_bytes(tar.header("00000000.tokens.pyd", 128 + 1400) + data[512:])
    consistent(dataset, 0)


@pytest.mark.parametrize(
    "fault, expected",
    [
        (fault_token, r"00000001\.tar, chunk 00000001: token id 400 is not below .* expected ids below 400"),
        (fault_docs_order, r"00000000\.tar, chunk 0000000\d: its document starts do not increase"),
        (fault_docs_beyond, r"00000000\.tar, chunk 00000000: a document starts at token 700, expected .* 700 tokens"),
        (fault_continues, r"00000000\.tar, chunk 00000000: its first document starts at token 0, its flags are 1"),
        (fault_moved, r"00000000\.tar, chunk 00000001: tokens_offset is [\d,]+, expected [\d,]+ as in its sidecar"),
        (fault_text_bytes, r"00000000\.tar: its tokens stand for [\d,]+ bytes of text, expected [\d,]+"),
        (fault_not_full, r"index\.json: full_chunks is false and chunk_tokens 700, .* 700 tokens, all full: True"),
        (fault_vocabulary, r"tokenizer\.model: its vocabulary of 400 or its special ids are not those of .* \(401\)"),
        (fault_member, r"00000000\.tar: member '00000000\.tokens\.pyd' is a pickle, .* refused"),
    ],
)
def test_deep_finds_what_was_written_wrongly(dataset, capsys, fault, expected):
    fault(dataset)
    assert run(capsys, dataset.folder)[0] == 0  # all hashes are right
    status, lines = run(capsys, dataset.folder, "--deep")
    assert status == 1
    assert any(re.match(f"{re.escape(str(dataset.folder))}/{expected}$", line) for line in lines), lines


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"offset": (1, 3)}, "chunk 00000001: its bytes do not begin where those of the chunk before end"),
        ({"bytes": (0, 1 << 50)}, "chunk 00000000: a position or a count is outside the shard"),
        ({"tokens_offset": (1, 600)}, "chunk 00000001: its tokens lie outside its bytes"),
        ({"tokens": (1, 699)}, "chunk 00000001: it does not hold 700 tokens"),
        ({"docs_offset": (1, 600)}, "chunk 00000001: its document starts lie outside its bytes"),
        ({"flags": (1, 4)}, "chunk 00000001: its flags do not go together"),
        ({"flags": (0, WHOLE)}, "chunk 00000000: its flags do not go together"),
        ({"docs": (0, 40)}, r"its chunks hold \d+ documents, expected \d+"),
        ({"docs": (0, -1)}, "chunk 00000000: a position or a count is outside the shard"),
    ],
)
def test_a_made_up_sidecar_is_refused(dataset, capsys, rows, message):
    """Also in training: nothing outside the bytes that were checked is ever read."""
    consistent(dataset, 0, rows=rows)
    with pytest.raises(ValueError, match=rf"00000000\.idx\.npy does not fit its shard: .*{message}"):
        ShardReader(manifests.load(dataset.folder)).read(np.array([0]), np.array([0]), 10)
    status, lines = run(capsys, dataset.folder)
    assert status == 1 and any(re.search(rf"00000000\.idx\.npy: {message}", line) for line in lines), lines


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"dtype": "|O"}, "dtype, full_chunks or chunk_tokens is none that this program writes"),
        ({"dtype": "<f4"}, "dtype, full_chunks or chunk_tokens is none that this program writes"),
        ({"chunk_tokens": 0}, "dtype, full_chunks or chunk_tokens is none that this program writes"),
        ({"full_chunks": 1}, "dtype, full_chunks or chunk_tokens is none that this program writes"),
        ({"chunk_tokens": -5}, "chunk_tokens is -5, expected a count"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a count"),
        ({"vocab_size": True}, "vocab_size is True, expected a count"),
        ({"tokenizer_sha256": "../../etc/passwd"}, "tokenizer_sha256 is '../../etc/passwd', expected 64 hex digits"),
        ({"special_ids": [1]}, r"special_ids is \[1\], expected ids below 400"),
        ({"special_ids": {"bos": 400}}, "special_ids is {'bos': 400}, expected ids below 400"),
        ({"shard": {"bytes": -1}}, "bytes is -1, expected a count"),
        ({"shard": {"tokens": 1 << 62}}, "tokens is 4611686018427387904, expected a count"),
        ({"shard": {"docs": 1.5}}, "docs is 1.5, expected a count"),
        ({"shard": {"sha256": "/" * 64}}, "sha256 is '////*', expected 64 hex digits"),
        ({"shard": {"index_sha256": None}}, "index_sha256 is None, expected 64 hex digits"),
        ({"shard": {"name": "00000000.tar"}}, "lists a shard twice"),
        ({"shard": {"name": ["x.tar"]}}, "is not a plain shard name"),
        ({"shards": ()}, "holds no tokens"),
    ],
)
def test_a_made_up_index_is_refused(dataset, capsys, facts, message):
    """Its fingerprint is right: another program wrote it. What it says would become memory, paths and sizes."""
    if shard := facts.pop("shard", None):
        facts["shards"] = (dataset.shards[0], replace(dataset.shards[1], **shard), *dataset.shards[2:])
    manifests.save(replace(dataset, **facts), dataset.folder)
    with pytest.raises(ValueError, match=message):
        manifests.load(dataset.folder)
    status, lines = run(capsys, dataset.folder)
    assert status == 1 and len(lines) == 2


def test_an_index_nested_too_deep_is_refused(dataset):
    (dataset.folder / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="index.json is not a valid index"):
        manifests.load(dataset.folder)


def test_usage(dataset, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([tmp_path / "nothing"], "nothing is not a folder"),
        ([tmp_path / "empty"], "hold no index.json and no .tar"),
        (["s3://bucket/data"], "s3://bucket/data is remote"),
    ):
        with pytest.raises(ValueError, match=message):
            main(list(map(str, argv)))
    assert run(capsys, dataset.folder, "--tokenizer", "x")[0] == 2
    (dataset.folder / "index.json").write_text("{}\n")
    status, lines = run(capsys, dataset.folder)
    assert status == 1 and lines[0].startswith(f"{dataset.folder}/index.json is not a valid index")
    (dataset.folder / "index.json").unlink()
    with pytest.raises(ValueError, match="data has no index.json: write one with --rebuild"):
        main([str(dataset.folder)])


# --- rebuilding ---


def damage_index(folder):
    (folder / "index.json").write_bytes((folder / "index.json").read_bytes()[:100])


def damage_sidecars(folder):
    (folder / "00000000.idx.npy").write_bytes(b"")
    (folder / "00000001.idx.npy").unlink()


def damage_both(folder):
    (folder / "index.json").unlink()
    damage_sidecars(folder)


@pytest.mark.parametrize("damage", [damage_index, damage_sidecars, damage_both, lambda folder: None])
def test_our_own_index_is_mended_to_the_byte(dataset, capsys, damage):
    before, fingerprint = files(dataset.folder), dataset.fingerprint
    damage(dataset.folder)
    status, lines = run(capsys, dataset.folder, "--rebuild")
    assert status == 0 and len(lines) == 1
    assert files(dataset.folder) == before and manifests.load(dataset.folder).fingerprint == fingerprint
    assert run(capsys, dataset.folder, "--deep")[0] == 0


def test_what_the_tars_do_not_say_is_kept(tmp_path, tokenizer, capsys):
    """The bytes of a text with U+2581, and the size of a chunk when no chunk is full."""
    manifest = write(tmp_path / "data", tokenizer, ["a\u2581b", "c"])
    before = files(manifest.folder)
    (manifest.folder / "00000000.idx.npy").unlink()
    assert run(capsys, manifest.folder, "--rebuild")[0] == 0
    assert files(manifest.folder) == before


def test_a_rebuild_that_is_stopped_leaves_nothing(dataset, tokenizer):
    """Ctrl-C in the last shard: what was read so far waited under temporary names."""
    (dataset.folder / "index.json").unlink()
    (dataset.folder / "00000000.idx.npy").unlink()
    before, seen = files(dataset.folder), []

    def progress(size: int) -> None:
        seen.append(size)
        if sum(seen) == sum(shard.bytes for shard in dataset.shards):
            assert "00000000.idx.npy.tmp" in files(dataset.folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuild(dataset.folder, tokenizer.path, progress)
    assert files(dataset.folder) == before


def test_a_changed_set_of_shards_is_said(dataset, capsys, tmp_path, tokenizer):
    other = write(tmp_path / "other", tokenizer, texts(5, 800))
    shutil.copy(other.folder / "00000000.tar", dataset.folder / "00000001.tar")
    (dataset.folder / "00000002.tar").unlink()
    status, lines = run(capsys, dataset.folder, "--rebuild", "--deep")
    assert status == 0
    assert lines[1:-1] == [
        "note: 00000001.tar is not the one that the old index named; it is taken as it is now",
        "note: 00000002.tar, which the old index named, is not there any more",
    ]
    assert (
        manifests.load(dataset.folder).tokens
        == dataset.tokens - sum(dataset.shards[i].tokens for i in (1, 2)) + other.tokens
    )


def stock_shards(folder: Path, samples: list[dict], per_shard: int = 4, **options) -> None:
    """Tars as stock webdataset writes them."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=per_shard, verbose=0, **options) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"set/{number:06d}", **sample})


def stock_reads(folder: Path) -> list[dict]:
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(paths, shardshuffle=False).decode())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
@pytest.mark.parametrize("docs", [True, False])
def test_shards_of_stock_webdataset(tmp_path, tokenizer, capsys, dtype, docs):
    rng = np.random.default_rng(0)
    samples = []
    for size in (300, 1, 77, 1000, 50, 49, 640):
        sample = {"tokens.npy": rng.integers(0, 400, size).astype(dtype)}
        if docs:
            sample["docs.npy"] = np.unique(rng.integers(0, size, 3)).astype(np.int32)
        samples.append(sample)
    samples.insert(3, {"tokens.npy": np.zeros(0, dtype), "txt": "no tokens"})
    samples.insert(5, {"json": {"a": 1}})
    stock_shards(tmp_path / "data", samples)
    status, lines = run(capsys, tmp_path / "data", "--rebuild", "--tokenizer", tokenizer.path)
    assert status == 0 and lines == [
        f"{tmp_path}/data: 3 shards, 2,117 tokens; wrote index.json, tokenizer.model, part-000.idx.npy, "
        "part-001.idx.npy and 1 more",
        "note: members that hold no tokens were passed over: 1 x .txt, 1 x .tokens.npy without a token, 1 x .json",
    ]
    assert run(capsys, tmp_path / "data", "--deep")[0] == 0
    manifest = manifests.load(tmp_path / "data")
    assert not manifest.full_chunks and manifest.chunk_tokens == 1000 and manifest.vocab_size == 400
    assert manifest.dtype == ("<u2" if dtype == np.uint16 else "<u4")
    held = [sample for sample in samples if len(sample.get("tokens.npy", ()))]
    assert manifest.docs == sum(len(sample["docs.npy"]) if docs else 1 for sample in held)
    lengths = tokenizer.byte_lengths()
    assert manifest.text_bytes == sum(int(lengths[sample["tokens.npy"]].sum()) for sample in held)
    check_windows(manifest, [sample["tokens.npy"] for sample in held], seq_len=49)
    flags = np.concatenate([manifest.chunks(i)["flags"] for i in range(3)]).tolist()
    assert flags == [(CONTINUES if sample["docs.npy"][0] else 0) if docs else WHOLE for sample in held]


def check_windows(manifest: Manifest, arrays: list[np.ndarray], seq_len: int) -> None:
    """The windows of a data set are those of its arrays, in order."""
    expected = [array[i : i + seq_len] for array in arrays for i in range(0, len(array) - seq_len + 1, seq_len)]
    counts = manifest.windows_per_shard(seq_len)
    shard = np.repeat(np.arange(len(counts)), counts)
    window = np.concatenate([np.arange(count) for count in counts])
    tokens, _ = ShardReader(manifest).read(shard, window, seq_len)
    np.testing.assert_array_equal(tokens[:, :-1], np.stack(expected))


def test_equal_samples_give_full_chunks(tmp_path, tokenizer, capsys):
    samples = [{"tokens.npy": np.full(size, 9, np.uint16)} for size in (64, 64, 64, 20, 64, 33)]
    stock_shards(tmp_path / "data", samples)
    assert run(capsys, tmp_path / "data", "--rebuild", "--tokenizer", tokenizer.path, "--deep")[0] == 0
    manifest = manifests.load(tmp_path / "data")
    assert manifest.full_chunks and manifest.chunk_tokens == 64
    assert manifest.windows_per_shard(16).tolist() == [13, 6]
    check_windows(manifest, [sample["tokens.npy"] for sample in samples], 16)


def test_stock_webdataset_reads_ours_and_again(dataset, tokenizer, tmp_path, capsys):
    """Ours, read by stock webdataset, written by it, indexed, read: the same tokens and documents."""
    samples = stock_reads(dataset.folder)
    whole = np.concatenate([sample["tokens.npy"] for sample in samples])
    ids = [[*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix] for text in texts(30)]
    np.testing.assert_array_equal(whole, np.concatenate(ids))
    stock_shards(tmp_path / "theirs", [{k: sample[k] for k in ("tokens.npy", "docs.npy")} for sample in samples], 5)
    assert run(capsys, tmp_path / "theirs", "--rebuild", "--deep", "--tokenizer", tokenizer.path)[0] == 0
    theirs = manifests.load(tmp_path / "theirs")
    assert (theirs.tokens, theirs.docs, theirs.text_bytes) == (dataset.tokens, dataset.docs, dataset.text_bytes)
    check_windows(theirs, [sample["tokens.npy"] for sample in samples], 100)
    for a, b in zip(samples, stock_reads(tmp_path / "theirs"), strict=True):
        for name in ("tokens.npy", "docs.npy"):
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


GOOD = np.arange(10, dtype=np.uint16)


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"tokens.npy": GOOD.astype(np.int64)}, r"it holds int64: write uint16 .* array\.astype\(np\.uint16\)"),
        ({"tokens.npy": GOOD.astype(np.uint8)}, "it holds uint8: write uint16"),
        ({"tokens.npy": GOOD.astype(">u2")}, "it holds >u2: write uint16"),
        ({"tokens.npy": GOOD.astype(np.float32)}, "it holds float32: write uint16"),
        ({"tokens.npy": GOOD.reshape(2, 5)}, r"its shape is \(2, 5\), expected one dimension"),
        ({"tokens.npy": np.asfortranarray(GOOD.reshape(2, 5))}, "Fortran order, expected one dimension"),
        ({"tokens.npy": np.uint16(3)}, r"its shape is \(\), expected one dimension"),
        ({"tokens.npy": GOOD + np.uint16(391)}, "chunk 00000000: token id 400 is not below"),
        ({"tokens.npy": np.array([3, -1], np.int32)}, "chunk 00000000: token id -1 is not below"),
        ({"tokens.npy": GOOD, "docs.npy": np.array([0, 3])}, "it holds int64: write int32"),
        ({"tokens.npy": GOOD, "docs.npy": np.array([0, 3, 3], np.int32)}, "its document starts do not increase"),
        ({"tokens.npy": GOOD, "docs.npy": np.array([-1, 3], np.int32)}, "its document starts do not increase"),
        ({"tokens.npy": GOOD, "docs.npy": np.array([0, 10], np.int32)}, "a document starts at token 10"),
        ({"docs.npy": np.array([0], np.int32)}, "'set/000001' has docs.npy without tokens.npy"),
        ({"json": 3}, r"holds no tokens \(there is: 1 x \.json\)"),
        ({"tokens.npy": GOOD, "pyd": [1]}, r"member 'set/000001\.pyd' is a pickle, .* refused"),
        ({"tokens.npy": GOOD, "pth": b"x"}, r"member 'set/000001\.pth' is a pickle, .* refused"),
    ],
)
def test_unfit_samples_of_stock_webdataset(tmp_path, tokenizer, sample, message):
    if sample.get("pth"):
        pytest.importorskip("torch")
    stock_shards(tmp_path / "data", [{"tokens.npy": GOOD}, sample], per_shard=1)
    refused(tmp_path / "data", tokenizer, message)


def refused(folder: Path, tokenizer: Tokenizer, message: str) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match=message):
        main([str(folder), "--rebuild", "--tokenizer", str(tokenizer.path)])
    assert files(folder) == before  # nothing was written


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def tar_of(*members: tuple[str, bytes]) -> bytes:
    data = b""
    for name, content in members:
        data += tar.header(name, len(content)) + content + b"\0" * (-len(content) % 512)
    return data + tar.end_of_archive(len(data))


def claim(array: np.ndarray, count: str) -> bytes:
    """An .npy file whose header claims another number of numbers."""
    return npy(array).replace(f"({len(array)},)".encode(), f"({count},)".encode().ljust(len(f"({len(array)},)")), 1)


@pytest.mark.parametrize(
    "data, message",
    [
        (tar_of(("0.tokens.npy", claim(np.arange(1000, dtype="<u2"), "1001"))), "claims 1,001 .* not 2,000 bytes"),
        (tar_of(("0.tokens.npy", claim(np.arange(1000, dtype="<u2"), "999"))), "claims 999 numbers"),
        (tar_of(("0.tokens.npy", claim(np.arange(10000, dtype="<u2"), "-1"))), "not a .npy file|claims -1 numbers"),
        (tar_of(("0.tokens.npy", claim(np.arange(10000, dtype="<u2"), "9" * 5))), "claims 99,999 numbers"),
        (tar_of(("0.tokens.npy", b"not an array")), r"member '0\.tokens\.npy': not a \.npy file"),
        (tar_of(("0.tokens.npy", b"")), r"member '0\.tokens\.npy': not a \.npy file"),
        (tar_of(("0.tokens.npy", npy(GOOD)), ("0.tokens.npy", npy(GOOD))), "is there twice"),
        (tar_of(("0.tokens.npy", npy(GOOD)), ("1.tokens.npy", npy(GOOD.astype("<u4")))), "holds <u4, those before"),
        (tar_of(("../0.tokens.npy", npy(GOOD))), r"'\.\./0\.tokens\.npy' points out of the archive"),
        (tar_of(("/0.tokens.npy", npy(GOOD))), "points out of the archive"),
        (tar_of(("0.tokens.npy", npy(GOOD)), ("x.pkl", b"")), "is a pickle"),
        (tar_of(("0.tokens.npy", npy(GOOD)), ("x.PICKLE", b"")), "is a pickle"),
        (tar_of(("0.tokens.npy", npy(GOOD)))[:1536], "cut short"),
        (gzip.compress(tar_of(("0.tokens.npy", npy(GOOD)))), "not a whole, uncompressed tar"),
        (b"", "not a whole, uncompressed tar"),
    ],
)
def test_unfit_tars(tmp_path, tokenizer, data, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(tar_of(("0.tokens.npy", npy(GOOD))))  # a good one first
    (tmp_path / "data" / "b.tar").write_bytes(data)
    refused(tmp_path / "data", tokenizer, message)


def test_one_dtype_in_a_data_set(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(tar_of(("0.tokens.npy", npy(GOOD))))
    (tmp_path / "data" / "b.tar").write_bytes(tar_of(("0.tokens.npy", npy(GOOD.astype("<i4")))))
    refused(tmp_path / "data", tokenizer, "b.tar holds <u4, a.tar <u2: write all tokens with one dtype")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "x.tar.bz2"])
def test_compressed_tars_by_name(tmp_path, tokenizer, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(tar_of(("0.tokens.npy", npy(GOOD))))
    (tmp_path / "data" / name).write_bytes(b"")
    refused(tmp_path / "data", tokenizer, f"{name} is compressed, so it cannot be read by position: unpack it")


def test_which_tokenizer(dataset, tokenizer, tmp_path, capsys):
    folder, index = dataset.folder, (dataset.folder / "index.json").read_bytes()
    other = tmp_path / "other.model"
    other.write_bytes(train([TEXT[:3000]] * 3, 350))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model is not there: name the tokenizer .* with --tokenizer FILE"):
        main([str(folder), "--rebuild"])
    with pytest.raises(ValueError, match=r"other.model is not the tokenizer that .*index.json names"):
        main([str(folder), "--rebuild", "--tokenizer", str(other)])
    with pytest.raises(ValueError, match="missing.model is not there"):
        main([str(folder), "--rebuild", "--tokenizer", str(tmp_path / "missing.model")])
    shutil.copy(other, folder / "tokenizer.model")  # not the one that the index names: replaced
    assert run(capsys, folder, "--rebuild", "--tokenizer", tokenizer.path)[0] == 0
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert (folder / "index.json").read_bytes() == index
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.model is another tokenizer than .*other.model"):
        main([str(folder), "--rebuild", "--tokenizer", str(other)])


# --- what would run programs ---


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self):
        return open, (self._marker, "w")


def object_npy(marker: Path) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return out.getvalue() + pickle.dumps([Payload(marker)])


@pytest.mark.parametrize("name", ["0.tokens.npy", "0.docs.npy", "0.extra.npy", "0.npy", "0.TOKENS.NPY"])
@pytest.mark.parametrize("deep", [False, True])
def test_python_objects_are_never_unpickled(tmp_path, tokenizer, capsys, name, deep):
    marker = tmp_path / "marker"
    payload = object_npy(marker)
    pickle.loads(payload[payload.index(b"\n") + 1 :])  # the payload works
    assert marker.exists()
    marker.unlink()
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.tar"
    if not deep:
        path.write_bytes(tar_of((name, payload), ("1.tokens.npy", npy(GOOD))))
        refused(tmp_path / "data", tokenizer, f"member '{name}': it holds Python objects, which are never unpickled")
    else:  # in a data set whose index says that it is good
        path.write_bytes(tar_of(("1.tokens.npy", npy(GOOD)), ("0.x".ljust(len(name), "x"), payload)))
        assert run(capsys, tmp_path / "data", "--rebuild", "--tokenizer", tokenizer.path)[0] == 0
        path.write_bytes(tar_of(("1.tokens.npy", npy(GOOD)), (name, payload)))
        consistent(manifests.load(tmp_path / "data"), 0)
        status, lines = run(capsys, tmp_path / "data", "--deep")
        assert status == 1 and "it holds Python objects" in lines[0]
        reader = ShardReader(manifests.load(tmp_path / "data"))
        assert reader.read(np.array([0]), np.array([0]), 5)[0].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert not marker.exists()


def test_names_that_other_readers_would_run(tmp_path, tokenizer, dataset, capsys):
    """`pipe:` names, as stock webdataset takes them, and links, in every place where a name is read."""
    marker = tmp_path / "marker"
    command = f"pipe:touch {marker};.tar"
    with pytest.raises(ValueError, match="is not a folder"):
        main([command])
    manifests.save(replace(dataset, shards=(replace(dataset.shards[0], name=command),)), dataset.folder)
    status, lines = run(capsys, dataset.folder)
    assert status == 1 and "is not a plain shard name" in lines[0]
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "pipe:touch marker;.tar").write_bytes(tar_of(("0.tokens.npy", npy(GOOD))))
    refused(tmp_path / "named", tokenizer, "is not a plain shard name")
    (tmp_path / "links").mkdir()
    link = tar.header("0.tokens.npy", 0)[:156] + b"2" + str(tmp_path / "secret").encode().ljust(100, b"\0")
    link = link + tar.header("0.tokens.npy", 0)[len(link) :]
    link = link[:148] + b"%06o\0 " % sum(link[:148] + b" " * 8 + link[156:]) + link[156:]
    (tmp_path / "links" / "a.tar").write_bytes(link + tar.end_of_archive(512))
    refused(tmp_path / "links", tokenizer, "is not a plain file .a link, a device, .*: refused")
    assert not marker.exists() and not Path("marker").exists()
