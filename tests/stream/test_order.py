"""The order of samples: exact, complete, the same for ever."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from pretrain.stream import order as order_module
from pretrain.stream.order import LANES, Order, hash_key, permutation, splitmix64


def triples(places) -> list[tuple[int, int, int]]:
    return list(zip(places.epoch.tolist(), places.shard.tolist(), places.window.tolist(), strict=True))


def windows(total: int, shards: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(total, np.ones(shards) / shards)
    return np.concatenate([counts, [0]])  # a shard too short for any window


def test_splitmix64_is_the_published_generator():
    assert [hex(x) for x in splitmix64(0, 3).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    assert splitmix64(0xFFFFFFFFFFFFFFFF, 2).dtype == np.uint64


def test_keys_tell_every_part_apart():
    parts = [(s, e, u) for s in (-1, 0, 1, 2**63, 2**64 - 2) for e in range(4) for u in (1, 2)]
    assert len({hash_key(*p) for p in parts}) == len(parts)
    assert hash_key(1, 2) != hash_key(2, 1)


@pytest.mark.parametrize("total", [1, 5, 31, 32, 33, 1000, 32 * 64 + 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_window_once_an_epoch(total, shuffle, monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK", 20)  # several blocks, and a last one that is short
    counts = windows(total, 5)
    order = Order(counts, seed=3, shuffle=shuffle)
    assert order.epoch_samples == total
    every = {(s, w) for s, n in enumerate(counts.tolist()) for w in range(n)}
    for epoch in (0, 1, 5):
        found = triples(order.locate(np.arange(epoch * total, (epoch + 1) * total)))
        assert {e for e, _, _ in found} == {epoch}
        assert len(found) == len({(s, w) for _, s, w in found}) == total
        assert {(s, w) for _, s, w in found} == every


def plain_order(counts: list[int], seed: int, epoch: int, block: int, group: int = 1) -> list[tuple[int, int]]:
    """One epoch as the design describes it, without vectors: (shard, window) of samples 0, 1, ..."""
    groups = [range(s, min(s + group, len(counts))) for s in range(0, len(counts), group)]
    hashes = splitmix64(hash_key(seed, epoch, 1), len(groups)).tolist()
    permuted = sorted(range(len(groups)), key=lambda g: hashes[g])
    line = [(s, w) for g in permuted for s in groups[g] for w in range(counts[s])]
    count = max(1, min(LANES, len(line) // block))
    lanes, start = [], 0
    for lane in range(count):
        length = len(line) // count + (lane < len(line) % count)
        mine = line[start : start + length]
        start += length
        moved = []
        for b in range(0, length, block):
            part = mine[b : b + block]
            hashes = splitmix64(hash_key(seed, epoch, 2, lane, b // block), len(part))
            moved += [part[i] for i in sorted(range(len(part)), key=lambda i: int(hashes[i]))]
        lanes.append(moved)
    return [lanes[i % count][i // count] for i in range(len(line))]


@pytest.mark.parametrize("total", [7, 400, 1003])
def test_matches_a_plain_reading_of_the_design(total, monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK", 10)
    counts = windows(total, 4)
    order = Order(counts, seed=11)
    for epoch in (0, 3):
        found = triples(order.locate(np.arange(epoch * total, (epoch + 1) * total)))
        assert [(s, w) for _, s, w in found] == plain_order(counts.tolist(), 11, epoch, block=10)


@pytest.mark.parametrize("shards, most, group", [(10, 4, 3), (12, 4, 3), (13, 4, 4), (9, 1, 9)])
def test_very_many_shards_are_permuted_in_groups(shards, most, group, monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK", 10)
    monkeypatch.setattr(order_module, "GROUPS", most)
    counts = windows(1003, shards - 1)
    order = Order(counts, seed=11)
    for epoch in (0, 3):
        found = triples(order.locate(np.arange(epoch * 1003, (epoch + 1) * 1003)))
        assert [(s, w) for _, s, w in found] == plain_order(counts.tolist(), 11, epoch, 10, group)


def test_any_way_of_asking_gives_the_same_places():
    order = Order(windows(1000, 4), seed=7)
    numbers = np.arange(2500)
    whole = triples(order.locate(numbers))
    shuffled = np.random.default_rng(0).permutation(2500)
    assert triples(order.locate(shuffled)) == [whole[i] for i in shuffled.tolist()]
    fresh = Order(windows(1000, 4), seed=7)
    for start in (2499, 1000, 999, 17):  # a resume anywhere, with nothing before it
        assert triples(fresh.locate(np.arange(start, 2500))) == whole[start:]
    assert triples(order.locate(np.array([], dtype=np.int64))) == []


def test_epochs_and_seeds_differ():
    counts = windows(2000, 4)
    first = triples(Order(counts, seed=1).locate(np.arange(4000)))
    epoch_0 = [(s, w) for _, s, w in first[:2000]]
    epoch_1 = [(s, w) for _, s, w in first[2000:]]
    other_seed = [(s, w) for _, s, w in triples(Order(counts, seed=2).locate(np.arange(2000)))]
    for a, b in ((epoch_0, epoch_1), (epoch_0, other_seed), (epoch_1, other_seed)):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 100


def test_natural_order():
    places = Order(np.array([2, 0, 3]), seed=1, shuffle=False).locate(np.arange(7))
    assert triples(places) == [(0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 0, 0), (1, 0, 1)]


def test_a_lane_stays_in_its_part_of_the_line(monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK", 50)
    order = Order(np.array([32 * 100]), seed=1)
    places = order.locate(np.arange(32 * 100))
    for lane in (0, 13, 31):
        mine = places.window[lane::LANES]
        assert mine.min() == lane * 100 and mine.max() == lane * 100 + 99


def test_a_small_data_set_is_mixed_throughout():
    """Whatever stride it is read with, a part of the samples comes evenly from the whole line."""
    order = Order(np.array([10_000]), seed=1)
    window = order.locate(np.arange(10_000)).window
    for part in (window[:400], window[::32], window[3::4]):
        quarters = np.bincount(part // 2500, minlength=4) / len(part)
        assert (0.17 < quarters).all() and (quarters < 0.33).all()


def test_blocks_bound_how_far_a_window_moves():
    block = order_module.BLOCK
    order = Order(np.array([LANES * 2 * block]), seed=1)
    lane_0 = order.locate(np.arange(0, LANES * 2 * block, LANES)).window
    assert set(lane_0[:block].tolist()) == set(range(block))
    assert not np.array_equal(lane_0[:block], np.arange(block))


def test_the_order_is_pinned():
    """These values may never change: runs are resumed with another version of this program and of NumPy."""
    assert permutation(5, 8).tolist() == GOLDEN_PERMUTATION
    counts = np.array([600_000, 5, 0, 700_001, 40])
    places = Order(counts, seed=1234).locate(np.array([0, 1, 31, 32, 600_000, 1_300_045, 1_300_046, 10**12]))
    assert triples(places) == GOLDEN_PLACES
    line = Order(np.array([820, 796, 847, 881, 814, 842, 0]), seed=-9).locate(np.arange(12_000))
    data = np.stack([line.epoch, line.shard, line.window]).astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == GOLDEN_HASH


def test_far_into_a_huge_epoch_costs_little():
    order = Order(np.full(100_000, 1_000_000), seed=1)  # 100 billion samples
    places = order.locate(np.arange(5 * 10**10, 5 * 10**10 + 1024))
    assert len(set(triples(places))) == 1024


def test_memory_stays_bounded():
    order = Order(np.full(10, 1_000_000), seed=1)
    tracemalloc.start()
    order.locate(np.arange(0, 20_000_000, 10_007))  # every block of two epochs: 40 tables of 1 MiB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


GOLDEN_PERMUTATION = [3, 4, 2, 5, 0, 7, 1, 6]
GOLDEN_PLACES = [
    (0, 3, 127),
    (0, 3, 56002),
    (0, 0, 574198),
    (0, 3, 10361),
    (0, 3, 19926),
    (0, 3, 564312),
    (1, 0, 12195),
    (769203, 0, 222227),
]
GOLDEN_HASH = "7d92e162850ca0f1"
