"""Shards: the bytes written, stock webdataset reads them, windows come back exactly, damage is seen."""

import hashlib
import os
import tarfile
import zlib

import numpy as np
import pytest

from pretrain.shards import reader as shards_module
from pretrain.shards.reader import ShardReader
from pretrain.shards.sidecar import CONTINUES
from pretrain.shards.writer import DatasetWriter, token_dtype
from tests.data_helpers import random_documents, write_dataset


@pytest.fixture(scope="module")
def documents():
    return random_documents(60, 700) + random_documents(1, 20_000, seed=3)  # one longer than a shard


@pytest.fixture
def dataset(tmp_path, documents):
    return write_dataset(tmp_path / "data", documents)


def test_the_same_documents_give_the_same_bytes(dataset, documents, tmp_path):
    again = write_dataset(tmp_path / "again", documents)
    for path in sorted(dataset.folder.iterdir()):
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name
    for shard in dataset.shards:
        data = (dataset.folder / shard.name).read_bytes()
        assert len(data) == shard.bytes and hashlib.sha256(data).hexdigest() == shard.sha256
        assert len(data) % tarfile.RECORDSIZE == 0
    assert not list(dataset.folder.glob("*.tmp"))


def test_plain_tar_members(dataset):
    with tarfile.open(dataset.folder / "00000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:4]] == [
        "00000000.tokens.npy", "00000000.docs.npy", "00000001.tokens.npy", "00000001.docs.npy",
    ]  # fmt: skip
    assert all(m.isfile() and m.mtime == 0 and m.uid == 0 and m.uname == "" for m in members)


def read_with_webdataset(dataset) -> list[list[dict]]:
    webdataset = pytest.importorskip("webdataset")
    return [
        list(webdataset.WebDataset(str(dataset.folder / shard.name), shardshuffle=False).decode())
        for shard in dataset.shards
    ]


def test_stock_webdataset_reads_every_document(dataset, documents):
    found: list[list[np.ndarray]] = []  # documents in parts
    for shard, samples in zip(dataset.shards, read_with_webdataset(dataset), strict=True):
        assert len({sample["__key__"] for sample in samples}) == len(samples)
        assert sum(len(sample["tokens.npy"]) for sample in samples) == shard.tokens
        for sample in samples:
            tokens, starts = sample["tokens.npy"], sample["docs.npy"]
            assert tokens.dtype == "<u2" and starts.dtype == "<i4"
            head, *rest = np.split(tokens, starts)
            if len(head):
                found[-1].append(head)
            found += [[part] for part in rest]
    assert len(found) == len(documents) == dataset.docs
    for a, b in zip(found, documents, strict=True):
        np.testing.assert_array_equal(np.concatenate(a), b)


def test_sidecar_says_where_everything_lies(dataset):
    for i, samples in enumerate(read_with_webdataset(dataset)):
        data = (dataset.folder / dataset.shards[i].name).read_bytes()
        chunks = dataset.chunks(i)
        assert len(chunks) == len(samples)
        for chunk, sample in zip(chunks, samples, strict=True):
            tokens = np.frombuffer(data, "<u2", int(chunk["tokens"]), int(chunk["tokens_offset"]))
            docs = np.frombuffer(data, "<i4", int(chunk["docs"]), int(chunk["docs_offset"]))
            np.testing.assert_array_equal(tokens, sample["tokens.npy"])
            np.testing.assert_array_equal(docs, sample["docs.npy"])
            assert bool(chunk["flags"] & CONTINUES) == (len(docs) == 0 or docs[0] != 0)
        assert not chunks["flags"][0] & CONTINUES  # a document is never cut between shards
        ends = chunks["offset"] + chunks["bytes"]
        assert chunks["offset"].tolist() == [0, *ends[:-1].tolist()] and ends[-1] == len(data)  # every byte is watched
        for chunk in chunks:
            assert zlib.crc32(data[chunk["offset"] : chunk["offset"] + chunk["bytes"]]) == chunk["crc32"]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("seq_len", [1, 64, 999, 1000])
def test_windows(tmp_path, documents, dtype, seq_len):
    dataset = write_dataset(tmp_path / "data", documents, dtype=dtype)
    whole = np.concatenate(documents)
    reader = ShardReader(dataset)
    position = 0
    for shard in range(len(dataset.shards)):
        window = 0
        for chunk_tokens in dataset.chunks(shard)["tokens"].tolist():
            count = chunk_tokens // seq_len
            numbers = np.arange(window, window + count)
            tokens, last_is_target = reader.read(np.full(count, shard), numbers, seq_len)
            assert tokens.dtype == dtype and tokens.shape == (count, seq_len + 1)
            chunk = whole[position : position + chunk_tokens]
            np.testing.assert_array_equal(tokens[:, :-1].reshape(-1), chunk[: count * seq_len])
            for i in range(count):
                following = chunk[(i + 1) * seq_len :][:1]
                assert last_is_target[i] == (len(following) == 1)
                assert tokens[i, -1] == (following[0] if len(following) else 0)
            window += count
            position += chunk_tokens
    assert position == len(whole)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_any_order_any_length_and_few_open_files(tmp_path, documents, dtype, monkeypatch):
    dataset = write_dataset(tmp_path / "data", documents, dtype=dtype)
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    reader, fresh = ShardReader(dataset), ShardReader(dataset)
    rng = np.random.default_rng(0)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for seq_len in (50, 7, 50):
        counts = dataset.windows_per_shard(seq_len)
        shard = rng.integers(0, len(counts), size=40)
        window = rng.integers(0, counts[shard])
        tokens, last = reader.read(shard, window, seq_len)
        kept = tokens.copy()
        for i in range(40):
            one, one_last = fresh.read(shard[i : i + 1], window[i : i + 1], seq_len)
            np.testing.assert_array_equal(one[0], tokens[i])
            assert one_last[0] == last[i]
        reader.read(shard[::-1], window[::-1], seq_len)
        np.testing.assert_array_equal(tokens, kept)  # what was read stays as it was
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        fresh.close()
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_is_seen_on_first_touch(dataset):
    path = dataset.folder / "00000000.tar"
    chunks = dataset.chunks(0)
    rng = np.random.default_rng(1)
    for _ in range(60):
        number = int(rng.integers(len(chunks)))
        start, size = int(chunks[number]["offset"]), int(chunks[number]["bytes"])
        bit = int(rng.integers(8 * start, 8 * (start + size)))
        flip(path, bit)
        windows = np.cumsum(chunks["tokens"] // 10)
        touch = np.array([windows[number] - 1])  # the last window of the chunk, wherever the flip is
        with pytest.raises(ValueError, match=f"00000000.tar is damaged in chunk {number:08d}: crc32 .* sidecar says"):
            ShardReader(dataset).read(np.array([0]), touch, 10)
        flip(path, bit)
    ShardReader(dataset).read(np.zeros(windows[-1], dtype=int), np.arange(windows[-1]), 10)  # whole again: no alarm


def test_a_shard_cut_while_in_use_is_seen(dataset):
    reader = ShardReader(dataset)
    os.truncate(dataset.folder / "00000000.tar", 2000)
    with pytest.raises(ValueError, match="00000000.tar is damaged in chunk 00000000: the file ends before byte"):
        reader.read(np.array([0]), np.array([0]), 10)


def test_ids_beyond_the_vocabulary_are_seen(tmp_path):
    dataset = write_dataset(tmp_path / "data", [np.array([1, 5, 6, 2])] * 20 + [np.array([1, 77, 6, 2])], vocab_size=77)
    message = "00000000.tar is damaged in chunk 00000000: token id 77 is not below the vocabulary size 77"
    with pytest.raises(ValueError, match=message):
        ShardReader(dataset).read(np.zeros(21, dtype=int), np.arange(21), 4)


def test_an_abandoned_shard_leaves_no_file(tmp_path):
    writer = DatasetWriter(tmp_path, "<u2", 10, 1000)
    writer.add(np.arange(50), 0)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_token_dtype():
    assert [token_dtype(n) for n in (300, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]
