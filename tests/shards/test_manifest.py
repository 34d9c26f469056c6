"""The index of a data set: what it says, and every fault in it named."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from pretrain.shards import manifest as manifests
from tests.data_helpers import random_documents, write_dataset


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", random_documents(60, 400))


def change_index(folder, **changes):
    """Change index.json and give it a right fingerprint, as another program could."""
    path = folder / "index.json"
    facts = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps(facts) + "\n")


def test_counts_and_windows(dataset):
    documents = random_documents(60, 400)
    assert dataset.tokens == sum(map(len, documents)) and dataset.docs == 60
    assert dataset.text_bytes == dataset.tokens - 120
    assert len(dataset.shards) > 1
    for seq_len in (1, 7, 1000, 1001):
        expected = [sum(n // seq_len for n in dataset.chunks(i)["tokens"].tolist()) for i in range(len(dataset.shards))]
        assert dataset.windows_per_shard(seq_len).tolist() == expected
    assert dataset.windows_per_shard(1).sum() == dataset.tokens
    assert dataset.windows_per_shard(1001).sum() == 0
    for i in range(len(dataset.shards)):
        tokens = dataset.chunks(i)["tokens"]
        assert (tokens[:-1] == 1000).all() and 0 < tokens[-1] <= 1000


def test_fingerprint_depends_on_the_content_only(dataset, tmp_path):
    again = write_dataset(tmp_path / "again", random_documents(60, 400))
    assert again.fingerprint == dataset.fingerprint
    one_token = random_documents(60, 400)
    one_token[-1][1] = 9 if one_token[-1][1] != 9 else 10
    assert write_dataset(tmp_path / "other", one_token).fingerprint != dataset.fingerprint
    assert replace(dataset, vocab_size=501).fingerprint != dataset.fingerprint


def test_fingerprint_is_pinned(dataset):
    """Runs keep it in their checkpoints: a change of the format's bytes must not go unseen."""
    assert dataset.fingerprint[:16] == "05d13b1691aa2132"


def test_open_split(dataset, tmp_path):
    shutil.copytree(dataset.folder, tmp_path / "both" / "train")
    shutil.copytree(dataset.folder, tmp_path / "both" / "val")
    assert manifests.open_split(tmp_path / "both", "val").location == f"{tmp_path}/both/val"
    assert manifests.open_split(f"{tmp_path}/both/", "train").location == f"{tmp_path}/both/train"
    assert manifests.open_split(dataset.folder, "train").location == str(dataset.folder)


def test_another_tokenizer_is_refused(dataset):
    dataset.check_tokenizer("tokenizer.model", "0" * 64)
    with pytest.raises(ValueError, match=r"another tokenizer than mine\.model .*use .*tokenizer\.model"):
        dataset.check_tokenizer("mine.model", "1" * 64)


def break_missing_folder(folder):
    shutil.rmtree(folder)


def break_no_index(folder):
    (folder / "index.json").unlink()


def break_json(folder):
    (folder / "index.json").write_text('{"format": 1, ')


def break_not_an_object(folder):
    (folder / "index.json").write_text("[1, 2]")


def break_version(folder):
    change_index(folder, format=2)


def break_field(folder):
    facts = json.loads((folder / "index.json").read_bytes())
    del facts["vocab_size"]
    (folder / "index.json").write_text(json.dumps(facts) + "\n")


def break_last_byte(folder):
    os.truncate(folder / "index.json", (folder / "index.json").stat().st_size - 1)


def break_content(folder):
    change_index(folder, vocab_size=499)


def break_shard_missing(folder):
    (folder / "00000001.tar").unlink()


def break_shard_short(folder):
    path = folder / "00000001.tar"
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize(
    "fault, message",
    [
        (break_missing_folder, "data is not a folder"),
        (break_no_index, "data has no index.json"),
        (break_json, "index.json is not a valid index"),
        (break_last_byte, "index.json is not a valid index .*cut short"),
        (break_not_an_object, "index.json is not a valid index"),
        (break_version, "index.json has format 2, this program reads format 1"),
        (break_field, "index.json lacks a field .*vocab_size"),
        (break_content, "index.json was changed"),
        (break_shard_missing, "00000001.tar is missing"),
        (break_shard_short, "00000001.tar has .* bytes where index.json says"),
    ],
)
def test_faults_are_named(dataset, fault, message):
    fault(dataset.folder)
    with pytest.raises(ValueError, match=message):
        manifests.load(dataset.folder)


def test_every_changed_bit_of_the_sidecar_is_seen(dataset):
    path = dataset.folder / "00000000.idx.npy"
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), size=200).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match="00000000.idx.npy is damaged"):
            dataset.chunks(0)
    path.unlink()
    with pytest.raises(ValueError, match="00000000.idx.npy is missing"):
        dataset.chunks(0)


@pytest.mark.parametrize("name", ["../00000000.tar", "/etc/passwd", "pipe:cat x.tar", ".hidden.tar", "a b.tar", ""])
def test_shard_names_stay_in_the_folder(dataset, name):
    manifests.save(replace(dataset, shards=(replace(dataset.shards[0], name=name),)), dataset.folder)
    with pytest.raises(ValueError, match="not a plain shard name"):
        manifests.load(dataset.folder)


def test_no_tokens(tmp_path):
    with pytest.raises(ValueError, match="holds no tokens"):
        write_dataset(tmp_path / "empty", [])
