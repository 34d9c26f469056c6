"""Windows are counted as a search for each of them would, put into the right bucket, and known by heart or not."""

import numpy as np
import pytest

from pretrain.evaluation import memorization
from pretrain.inference.generate import generate_batch
from pretrain.shards.documents import chunks as chunks_of
from tests.data_helpers import SPECIAL_IDS, random_documents, write_dataset
from tests.models import some_prompts, tiny_model

SPECIAL = list(SPECIAL_IDS.values())


def count_plainly(chunks: list[np.ndarray], row: np.ndarray) -> int:
    """How many places hold the row, one after the other."""
    return sum((chunk[i : i + len(row)] == row).all() for chunk in chunks for i in range(len(chunk) - len(row) + 1))


def test_counts_are_those_of_a_plain_search(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(7, 10, 3000)  # of three ids, so that short windows repeat
    chunks = np.array_split(tokens, 6)
    documents = [part for chunk in chunks for part in np.array_split(chunk, 3)]
    manifest = write_dataset(tmp_path, documents, chunk_tokens=500, shard_tokens=1000)
    rows = memorization.distinct(np.concatenate([rng.integers(7, 10, (200, 6)), np.full((1, 6), 10)]))
    counts = memorization.count_windows([manifest], rows)
    assert counts.tolist() == [count_plainly(chunks, row) for row in rows] and counts.max() > 5 and counts.min() == 0
    assert memorization.count_windows([manifest, manifest], rows).tolist() == (2 * counts).tolist()
    assert memorization.count_windows([manifest], np.repeat(rows, 2, axis=0)).tolist() == np.repeat(counts, 2).tolist()
    assert memorization.count_windows([manifest], np.empty((0, 6), dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_hash_depends_on_all_tokens_and_on_their_order_and_not_on_the_place(dtype):
    tokens = np.arange(10, 90).astype(dtype)
    found = memorization.hashes(np.concatenate([tokens, tokens]), 64)
    assert found[0] == found[80] and len(np.unique(found)) == 80
    changed, swapped = tokens.copy(), tokens.copy()
    changed[5] += 1
    swapped[[3, 60]] = swapped[[60, 3]]
    others = [memorization.hashes(some, 64)[0] for some in (changed, swapped)]
    assert len({int(found[0]), *map(int, others)}) == 3
    assert memorization.hashes(tokens[:63], 64).size == 0


def test_windows_are_in_the_bucket_of_their_count(tmp_path):
    once, often, held_out = (random_documents(12, longest=150, seed=seed) for seed in (1, 2, 3))
    twelve = [document for document in often[:6] for _ in range(12)]
    twice = [document for document in often[6:] for _ in range(2)]
    training = write_dataset(tmp_path / "train", [*once, *twelve, *twice], chunk_tokens=100_000, shard_tokens=200_000)
    validation = write_dataset(tmp_path / "val", [*held_out, *once[:3]], chunk_tokens=100_000, shard_tokens=200_000)
    read = []
    chosen = memorization.choose_windows([training], validation, SPECIAL, 40, read.append)
    assert sum(read) == memorization.tokens_to_read([training], validation)
    assert list(chosen) == ["once", "2 to 10 times", "11 times or more", "held out"]
    texts = dict(zip(chosen, (once, often[6:], often[:6], held_out), strict=True))
    for name, rows in chosen.items():
        assert rows.shape == (40, 64) and rows.dtype == np.int64 and len(np.unique(rows, axis=0)) == 40
        assert not np.isin(rows, SPECIAL).any()
        assert all(count_plainly(texts[name], row) == 1 for row in rows), name


def test_candidates_are_spread_over_all_shards(tmp_path):
    documents = random_documents(200, longest=200)
    manifest = write_dataset(tmp_path, documents)
    rows = memorization.windows([manifest], 64, 100, SPECIAL, lambda count: None)
    step, chunks = sum(map(len, documents)) // 100, [tokens for tokens, _ in chunks_of(manifest)]
    assert len(manifest.shards) > 3 and step < 1000
    expected = [chunk[place : place + 64] for chunk in chunks for place in range(0, len(chunk) - 63, step)]
    assert [row.tolist() for row in rows] == [row.tolist() for row in expected if not np.isin(row, SPECIAL).any()]


def test_memorized_rows_are_those_that_greedy_text_repeats(monkeypatch):
    for name, value in {"PROMPT": 7, "CONTINUATION": 8, "BATCH_SIZE": 5}.items():
        monkeypatch.setattr(memorization, name, value)
    model = tiny_model()
    prompts = np.array([prompt[:7] for prompt in some_prompts() * 3 if len(prompt) >= 7])
    rows = np.concatenate([prompts, np.array(generate_batch(model, prompts.tolist(), 8))], 1)
    right = np.arange(len(rows)) % 3 > 0
    rows[0, -1], rows[3, 7], rows[6, 10], rows[9, 12] = 96 - rows[[0, 3, 6, 9], [-1, 7, 10, 12]]
    told = []
    assert memorization.memorized(model, rows, told.append).tolist() == right.tolist()
    assert told == [5, 5, 2]
