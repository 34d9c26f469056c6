"""Ten thousand flipped bits and cuts all over the files of a data set: each is seen before its tokens are used."""

import functools
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pretrain.shards import manifest as manifests
from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import BadChunk, ShardReader
from pretrain.shards.verify import faults
from pretrain.shards.writer import DatasetWriter
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.data_helpers import python_like_text

SHARDS = ("00000000.tar", "00000001.tar", "00000002.tar")
SIDECARS = tuple(name.replace(".tar", ".idx.npy") for name in SHARDS)
FILES = (*SHARDS, *SIDECARS, "index.json", "tokenizer.model")


class Harm(NamedTuple):
    """A flipped bit, or the length that a file is cut to."""

    name: str
    bit: int | None
    length: int | None


class Piece(NamedTuple):
    """The windows of a chunk, as they are in the good data set."""

    shard: int
    chunk: int
    windows: np.ndarray
    tokens: np.ndarray


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Manifest:
    """Three shards of real text in chunks of 700 tokens, with their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    text = python_like_text(700)
    (folder / "tokenizer.model").write_bytes(train([text[i : i + 1000] for i in range(0, len(text), 1000)], 400))
    tokenizer = load_tokenizer(folder)
    writer = DatasetWriter(folder, "<u2", 700, 2000)
    start = 0
    for size in (1500, 700, 1500, 2000, 400, 2000, 600, 2500):
        part = text[start : start + size]
        writer.add(np.array([*tokenizer.prefix, *tokenizer.encode(part), *tokenizer.suffix]), len(part.encode()))
        start += size
    writer.finish(tokenizer.sha256, tokenizer.vocab_size, tokenizer.special_ids)
    manifest = manifests.load(folder)
    assert tuple(shard.name for shard in manifest.shards) == SHARDS
    assert min(len(manifest.chunks(i)) for i in range(3)) >= 3
    return manifest


@pytest.fixture(scope="module")
def copy(dataset, tmp_path_factory) -> Path:
    """A copy to do harm to; all harm is undone."""
    return Path(shutil.copytree(dataset.folder, tmp_path_factory.mktemp("copy") / "data"))


@contextmanager
def harmed(folder: Path, harm: Harm) -> Iterator[None]:
    """The folder with one bit flipped or one file cut, in place."""
    handle = os.open(folder / harm.name, os.O_RDWR)
    try:
        position = harm.length if harm.bit is None else harm.bit // 8
        tail = os.pread(handle, (1 << 20) if harm.bit is None else 1, position)
        if harm.bit is None:
            os.ftruncate(handle, position)
        else:
            os.pwrite(handle, bytes([tail[0] ^ 1 << harm.bit % 8]), position)
        yield
    finally:
        os.pwrite(handle, tail, position)
        os.close(handle)


@functools.cache
def harms(name: str, size: int) -> list[Harm]:
    """Evenly spaced and random flips and cuts of a file."""
    flips, cuts = {"tar": (2000, 150), "npy": (500, 150), "json": (1500, 400), "model": (250, 50)}[name.split(".")[-1]]
    rng = random.Random(f"faults of {name}")
    bits = [i * 8 * size // flips for i in range(flips)]  # all over the file ...
    bits = [bit - bit % 8 + i % 8 for i, bit in enumerate(bits)]  # ... and all over the bytes
    bits += rng.sample(range(8 * size), flips // 3)
    lengths = [i * size // cuts for i in range(cuts)] + [size - 1] + rng.sample(range(size), cuts // 3)
    return [Harm(name, bit, None) for bit in dict.fromkeys(bits)] + [
        Harm(name, None, length) for length in dict.fromkeys(lengths)
    ]


@functools.cache
def good_pieces(folder: Path, seq_len: int) -> list[Piece]:
    """All windows of a good data set, chunk by chunk."""
    manifest = manifests.load(folder)
    reader, pieces = ShardReader(manifest), []
    for shard in range(len(manifest.shards)):
        first = 0
        for chunk, tokens in enumerate(manifest.chunks(shard)["tokens"].tolist()):
            windows = np.arange(first, first + tokens // seq_len)
            pieces.append(Piece(shard, chunk, windows, reader.read(np.full(len(windows), shard), windows, seq_len)[0]))
            first += len(windows)
    assert first == manifest.windows_per_shard(seq_len)[-1] and len(pieces) >= 9
    return pieces


def use(folder: Path, good: list[Piece], seq_len: int, manifest: Manifest | None = None) -> ValueError | None:
    """Read all windows as training does, from index and tokenizer on, and say what stopped it.

    Tokens other than the good ones fail the test, and so does a chunk found damaged after it was delivered.
    """
    delivered = []
    reader = None
    try:
        manifest = manifest or manifests.load(folder)
        assert manifest.tokenizer_path.is_file()
        reader = ShardReader(manifest)
        for piece in good:
            tokens, _ = reader.read(np.full(len(piece.windows), piece.shard), piece.windows, seq_len)
            assert np.array_equal(tokens, piece.tokens), "tokens were delivered that are not those written"
            delivered.append((piece.shard, piece.chunk))
    except BadChunk as error:
        assert (error.shard, error.chunk) not in delivered
        return error
    except ValueError as error:
        return error
    finally:
        if reader:
            reader.close()
    return None


def chunk_at(manifest: Manifest, shard: int, byte: int) -> int:
    return int(np.searchsorted(manifest.chunks(shard)["offset"], byte, side="right")) - 1


def test_there_are_ten_thousand(dataset):
    plan = [harm for name in FILES for harm in harms(name, (dataset.folder / name).stat().st_size)]
    assert len(plan) == len(set(plan)) >= 10_000
    assert {harm.bit % 8 for harm in plan if harm.bit is not None} == set(range(8))


@pytest.mark.parametrize("name", FILES)
def test_every_fault_is_seen_before_its_tokens_are_used(dataset, copy, name):
    good, whole = good_pieces(dataset.folder, 50), (copy / name).read_bytes()
    for harm in harms(name, len(whole)):
        with harmed(copy, harm):
            error = use(copy, good, 50)
        assert error is not None, f"{harm} was not seen"
        assert name in str(error) or harm.name == "index.json", f"{harm}: {error}"
        if name in SHARDS and harm.bit is not None:
            shard = SHARDS.index(name)
            assert isinstance(error, BadChunk)
            assert (error.shard, error.chunk) == (shard, chunk_at(dataset, shard, harm.bit // 8)), harm
    assert (copy / name).read_bytes() == whole
    assert use(copy, good, 50) is None


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_cut_after_the_index_was_read(dataset, copy, name):
    """Its size was right when the run began; the chunks before the cut can still be used."""
    good, shard = good_pieces(dataset.folder, 50), SHARDS.index(name)
    manifest = manifests.load(copy)
    for harm in harms(name, manifest.shards[shard].bytes):
        if harm.length is not None:
            with harmed(copy, harm):
                error = use(copy, good, 50, manifest)
            assert isinstance(error, BadChunk)
            assert (error.shard, error.chunk) == (shard, chunk_at(dataset, shard, harm.length)), harm


@pytest.mark.parametrize("seq_len, times", [(7, 200), (50, 3800), (333, 6000)])
def test_no_false_alarm_on_good_shards(dataset, copy, seq_len, times):
    good = good_pieces(dataset.folder, seq_len)
    for _ in range(times):
        assert use(copy, good, seq_len) is None


def test_deep_verification_names_file_and_chunk(dataset, copy):
    assert list(faults(manifests.read_index(copy), True, lambda _: None)) == []
    rng = random.Random(0)
    for name in FILES:
        for harm in rng.sample(harms(name, (copy / name).stat().st_size), 26):
            with harmed(copy, harm):
                if name == "index.json":
                    with pytest.raises(ValueError, match="index.json|holds no tokens"):
                        manifests.read_index(copy)
                    continue
                found = list(faults(manifests.read_index(copy), True, lambda _: None))
            assert found and {fault.path.name for fault in found} == {name}, harm
            if name in SHARDS:
                shard = SHARDS.index(name)
                hurt = chunk_at(dataset, shard, harm.length if harm.bit is None else harm.bit // 8)
                chunks = [hurt] if harm.bit is not None else range(hurt, len(dataset.chunks(shard)))
                assert {fault.chunk for fault in found} == {None, *chunks}, harm
