"""Packing: whole documents in rows, every token a target once, the same plan whatever happens while it is made."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest

from pretrain.shards import reader as shards_module
from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import BadChunk, ShardReader
from pretrain.shards.sidecar import CONTINUES
from pretrain.stream import packing
from pretrain.stream.packing import PADDING, BestFit, Windows, best_fit_decreasing, cut
from tests.data_helpers import random_documents, write_dataset

PAD = 3


@pytest.fixture(scope="module")
def documents():
    """Of 2 to 700 tokens, one over many chunks, and single tokens."""
    single = [np.array([1]), np.array([2])]
    return random_documents(30, 700) + single + random_documents(1, 20_000, seed=3) + random_documents(40, 90, seed=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, documents) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("packing") / "data", documents)


def all_rows(packed):
    """(shard, tokens, is_target, documents) of every row, read a shard at a time."""
    for shard, rows in enumerate(packed.rows_per_shard.tolist()):
        numbers = np.arange(rows)
        for row in zip(*packed.read(np.full(rows, shard), numbers), strict=True):
            yield shard, *row


def documents_of(dataset: Manifest) -> list[tuple[int, np.ndarray]]:
    """(shard, tokens) of every document, read naively out of the tar files."""
    found: list[tuple[int, list[np.ndarray]]] = []
    for number, shard in enumerate(dataset.shards):
        with tarfile.open(dataset.folder / shard.name) as tar:
            arrays = [np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False) for member in tar]
        for tokens, starts in zip(arrays[::2], arrays[1::2], strict=True):
            head, *rest = np.split(tokens, starts)
            if len(head):
                found[-1][1].append(head)
            found += [(number, [part]) for part in rest]
    return [(shard, np.concatenate(parts)) for shard, parts in found]


# --- windows ---


@pytest.mark.parametrize("seq_len", [1, 64, 999, 1000])
def test_windows_know_the_documents_by_position(dataset, seq_len):
    boundaries = [np.concatenate([np.full(len(d), i) for i, (s, d) in enumerate(documents_of(dataset)) if s == shard])
                  for shard in range(len(dataset.shards))]  # fmt: skip
    packed, plain = Windows(ShardReader(dataset), seq_len, True), Windows(ShardReader(dataset), seq_len, False)
    assert packed.unused_tokens == dataset.tokens - int(packed.rows_per_shard.sum()) * seq_len
    assert packed.fill_rate == 1.0
    chunk_start, seen = 0, 0
    for shard, owner in enumerate(boundaries):
        row, chunk_start = 0, 0
        for size in dataset.chunks(shard)["tokens"].tolist():
            for start in range(0, size // seq_len * seq_len, seq_len):
                where = np.array([shard]), np.array([row])
                tokens, is_target, numbers = (part[0] for part in packed.read(*where))
                here = owner[chunk_start:][start : min(start + seq_len + 1, size)]
                assert numbers[: len(here)].tolist() == (np.unique(here, return_inverse=True)[1]).tolist()
                expected = np.append(here[1:] == here[:-1], [False] * (seq_len + 1 - len(here)))
                assert is_target.tolist() == expected.tolist()
                assert len(here) == seq_len + 1 or (numbers[-1], tokens[-1]) == (PADDING, 0)
                same, without, none = plain.read(*where)
                assert none is None and np.array_equal(same[0], tokens)
                assert without[0].tolist() == [True] * (len(here) - 1) + [False] * (seq_len + 1 - len(here))
                row += 1
                seen += len(numbers) > 1 and numbers.max() > 0
            chunk_start += size
    assert seen or seq_len == 1, "some windows hold more than one document"


def test_document_starts_are_kept_within_bounds(dataset, monkeypatch):
    unbounded = list(all_rows(Windows(ShardReader(dataset), 64, True)))
    monkeypatch.setattr(shards_module, "KEPT_STARTS", 40)
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    reader = ShardReader(dataset)
    packed = Windows(reader, 64, True)
    for _ in range(2):
        for a, b in zip(unbounded, all_rows(packed), strict=True):
            np.testing.assert_array_equal(a[3], b[3])
        assert sum(len(starts) + 1 for starts in reader._starts.values()) == reader._starts_kept <= 40


def test_without_a_list_a_chunk_that_continues_nothing_is_a_document(tmp_path):
    """Shards of others have no docs member: the sidecar then says docs=0."""
    dataset = write_dataset(tmp_path / "data", [np.full(250, 9)], chunk_tokens=100, shard_tokens=1000)
    facts = dataset.chunks(0)
    assert facts["docs"].tolist() == [1, 0, 0] and facts["flags"].tolist() == [0, CONTINUES, CONTINUES]
    facts["docs"] = 0
    facts["flags"] = [0, CONTINUES, 0]
    opened = shards_module._OpenShard("x.tar", open(dataset.folder / "00000000.tar", "rb"), facts, bytearray(3), "<u2")
    assert [opened.read_starts(chunk).tolist() for chunk in range(3)] == [[0], [], [0]]
    opened.close()


@pytest.mark.parametrize("starts", [[5, 5], [9, 4], [-1, 4], [100]])
def test_document_starts_that_make_no_sense_are_refused(tmp_path, starts):
    dataset = write_dataset(tmp_path / "data", [np.full(30, 9)] * 3 + [np.full(10, 9)], shard_tokens=1000)
    facts = dataset.chunks(0)
    with open(dataset.folder / "00000000.tar", "r+b") as file:
        file.seek(int(facts["docs_offset"][0]))
        file.write(np.array(starts, dtype="<i4").tobytes())
    facts["docs"] = len(starts)
    opened = shards_module._OpenShard("x.tar", open(dataset.folder / "00000000.tar", "rb"), facts, bytearray(1), "<u2")
    with pytest.raises(ValueError, match="x.tar: the document starts of chunk 00000000 are not ascending"):
        opened.read_starts(0)
    opened.close()


# --- best fit: the algorithm ---


@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("seed", range(4))
def test_packing_is_best_fit_decreasing(capacity, seed):
    """Replayed item by item, trying every row: each went into one with the least room of those that it fits into."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(4 / (capacity + 3), 200), capacity)
    items, row = best_fit_decreasing(lengths, capacity)
    assert items.tolist() == sorted(range(200), key=lambda item: (-lengths[item], item))
    rooms: list[int] = []
    for size, chosen in zip(lengths[items].tolist(), row.tolist(), strict=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            assert rooms[chosen] == min(fitting)
        else:
            assert chosen == len(rooms)
            rooms.append(capacity)
        rooms[chosen] -= size
    again = best_fit_decreasing(lengths.copy(), capacity)
    assert np.array_equal(again[0], items) and np.array_equal(again[1], row)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 10])
def test_long_documents_are_cut_so_that_every_token_but_the_first_is_a_target_once(seq_len):
    lengths = np.arange(1, 40)
    begins = np.cumsum(lengths) - lengths
    starts, sizes = cut(begins, lengths, seq_len)
    assert sizes.max() == seq_len + 1 and sizes.min() >= 1
    targets = Counter(t for s, n in zip(starts.tolist(), sizes.tolist(), strict=True) for t in range(s + 1, s + n))
    assert targets == Counter(t for s, n in zip(begins.tolist(), lengths.tolist(), strict=True)
                              for t in range(s + 1, s + n))  # fmt: skip
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        mine = sizes[(starts >= begin) & (starts < begin + length)]
        assert mine.tolist() == [length] if length <= seq_len + 1 else (mine[:-1] == seq_len + 1).all()


def test_realistic_lengths_fill_the_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 50_000).astype(np.int64), 3, 200_000)
    for seq_len in (512, 2048, 8192):
        _, sizes = cut(np.cumsum(lengths) - lengths, lengths, seq_len)
        items, row = best_fit_decreasing(sizes, seq_len + 1)
        filled = np.bincount(row, sizes[items])
        assert filled.max() <= seq_len + 1
        assert filled.mean() / (seq_len + 1) > 0.98


# --- best fit: rows ---


@pytest.mark.parametrize("seq_len", [1, 63, 700, 2500])
def test_best_fit_rows_are_the_documents(dataset, documents, tmp_path, seq_len):
    packed = BestFit(ShardReader(dataset), seq_len, True, tmp_path)
    expected = Counter()
    for shard, tokens in documents_of(dataset):
        assert len(tokens) > 4000 or len(tokens) < 701
        last = max(1, len(tokens) - 1)
        expected.update((shard, tokens[i : i + seq_len + 1].tobytes()) for i in range(0, last, seq_len))
    found, places, filled, targets = Counter(), 0, 0, 0
    for shard, tokens, is_target, numbers in all_rows(packed):
        assert len(tokens) == seq_len + 1 == len(numbers)
        held = int((numbers != PADDING).sum())
        assert (numbers[held:] == PADDING).all() and (tokens[held:] == PAD).all() and held > 0
        cuts = np.flatnonzero(np.diff(numbers[:held])) + 1
        for number, piece in enumerate(np.split(tokens[:held], cuts)):
            assert (numbers[:held][np.append(0, cuts)[number]]) == number
            found[shard, piece.astype("<u2").tobytes()] += 1
        inside = np.ones(seq_len, dtype=bool)
        inside[cuts - 1] = False
        inside[held - 1 :] = False
        assert is_target.tolist() == inside.tolist()
        places, filled, targets = places + seq_len + 1, filled + held, targets + int(is_target.sum())
    assert found == expected
    assert targets == sum(len(d) - 1 for d in documents)
    assert packed.fill_rate == filled / places and packed.unused_tokens == 0
    assert len(dataset.shards) > 3 and max(len(dataset.chunks(i)) for i in range(len(dataset.shards))) > 3


def test_any_rows_in_any_order(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "OPEN_SHARDS", 2)
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    packed, bare = (BestFit(ShardReader(dataset), 100, wanted, tmp_path) for wanted in (True, False))
    shard = np.repeat(np.arange(len(dataset.shards)), packed.rows_per_shard)
    row = np.concatenate([np.arange(n) for n in packed.rows_per_shard])
    mixed = np.random.default_rng(0).permutation(len(shard))
    together = packed.read(shard[mixed], row[mixed])
    tokens, is_target, none = bare.read(shard[mixed], row[mixed])
    assert none is None
    np.testing.assert_array_equal(tokens, together[0])
    np.testing.assert_array_equal(is_target, together[1])
    for i, place in enumerate(mixed.tolist()):
        for all_of_them, one in zip(together, packed.read(shard[[place]], row[[place]]), strict=True):
            np.testing.assert_array_equal(all_of_them[i], one[0])


def test_rows_are_mixed_and_not_sorted_by_length(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_documents(400, 64), shard_tokens=100_000)
    packed = BestFit(ShardReader(dataset), 64, True, tmp_path)
    longest = [np.bincount(numbers[numbers >= 0]).max() for _, _, _, numbers in all_rows(packed)]
    half = len(longest) // 2
    assert half > 50 and abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 5


def test_best_fit_needs_a_folder(dataset):
    with pytest.raises(ValueError, match="set data.cache"):
        BestFit(ShardReader(dataset), 64, True, None)


# --- best fit: the plan on disk ---


def plan_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("packing-*/*.bin"))}


def test_the_plan_is_the_same_twice_and_made_once(dataset, tmp_path, monkeypatch):
    first = BestFit(ShardReader(dataset), 100, True, tmp_path / "a")
    second = BestFit(ShardReader(dataset), 100, True, tmp_path / "b")
    files = plan_files(tmp_path / "a")
    assert files == plan_files(tmp_path / "b") and len(files) == len(dataset.shards) + 1
    expected = list(all_rows(first))
    BestFit(ShardReader(dataset), 101, True, tmp_path / "a")  # another length is another plan
    monkeypatch.setattr(packing, "plan", None)
    again = BestFit(ShardReader(dataset), 100, True, tmp_path / "a")
    assert again.rows_per_shard.tolist() == second.rows_per_shard.tolist() and again.fill_rate == first.fill_rate
    for a, b in zip(expected, all_rows(again), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "of another shard"])
@pytest.mark.parametrize("name", ["00000001.bin", "rows.bin"])
def test_a_damaged_plan_is_made_again(dataset, tmp_path, name, damage):
    made = BestFit(ShardReader(dataset), 100, True, tmp_path)
    expected, files = list(all_rows(made)), plan_files(tmp_path)
    (path,) = tmp_path.glob(f"packing-*/{name}")
    data = path.read_bytes()
    changes = {
        "flip": lambda: path.write_bytes(data[:30] + bytes([data[30] ^ 4]) + data[31:]),
        "cut": lambda: path.write_bytes(data[:-40]), "empty": lambda: path.write_bytes(b""), "missing": path.unlink,
        "of another shard": lambda: path.write_bytes(path.with_name("00000002.bin").read_bytes()),
    }  # fmt: skip
    changes[damage]()
    again = BestFit(ShardReader(dataset), 100, True, tmp_path)
    for a, b in zip(expected, all_rows(again), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    assert plan_files(tmp_path) == files


def test_a_damaged_chunk_is_seen_before_it_is_planned_or_read(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_documents(60, 300))
    packed = BestFit(ShardReader(dataset), 100, True, tmp_path / "good")
    shard, number = 1, 2
    facts = dataset.chunks(shard)[number]
    path = dataset.folder / dataset.shards[shard].name
    data = bytearray(path.read_bytes())
    data[int(facts["docs_offset"])] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadChunk, match="data.packing=window") as raised:
        BestFit(ShardReader(dataset), 100, True, tmp_path / "new")
    assert (raised.value.shard, raised.value.chunk) == (shard, number)
    fresh = BestFit(ShardReader(dataset), 100, True, tmp_path / "good")
    touching = [row for row in range(packed.rows_per_shard[shard]) if number in packed.chunks_of(shard, row)]
    for row in range(packed.rows_per_shard[shard]):
        if row in touching:
            with pytest.raises(BadChunk):
                fresh.read(np.array([shard]), np.array([row]))
        else:
            fresh.read(np.array([shard]), np.array([row]))
    assert 0 < len(touching) < packed.rows_per_shard[shard]
    windows = Windows(ShardReader(dataset), 100, True)
    assert windows.chunks_of(shard, 20) == [number]
    with pytest.raises(BadChunk):
        windows.read(np.array([shard]), np.array([20]))


@pytest.mark.parametrize("kind, want_documents", [(Windows, True), (Windows, False), (BestFit, False)])
def test_a_chunk_that_others_found_damaged_is_read_no_more(dataset, tmp_path, kind, want_documents):
    reader = ShardReader(dataset)
    packed = kind(reader, 100, want_documents, tmp_path)
    everything = [(s, r) for s, rows in enumerate(packed.rows_per_shard.tolist()) for r in range(rows)]
    assert sum(len(packed.read(np.array([s]), np.array([r]))[0]) for s, r in everything) == len(everything)
    reader.bad.add((1, 2))
    refused = 0
    for s, r in everything:
        if s == 1 and 2 in packed.chunks_of(s, r):
            refused += 1
            with pytest.raises(BadChunk, match="quarantine"):
                packed.read(np.array([s]), np.array([r]))
        else:
            packed.read(np.array([s]), np.array([r]))
    assert 0 < refused < len(everything)


PACK = """
import sys, time
from pathlib import Path
from pretrain.shards import manifest
from pretrain.stream import packing
from pretrain.shards.reader import ShardReader
folder, cache, seconds = sys.argv[1:]
make = packing.plan
def slow(reader, shard, seq_len):
    print("made", shard, flush=True)
    time.sleep(float(seconds))
    return make(reader, shard, seq_len)
packing.plan = slow
print(packing.BestFit(ShardReader(manifest.load(folder)), 100, True, Path(cache)).rows_per_shard.tolist())
"""


def start_packing(dataset, cache, seconds: float, environment) -> subprocess.Popen:
    line = [sys.executable, "-c", PACK, str(dataset.folder), str(cache), str(seconds)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_make_it_once(dataset, tmp_path, environment):
    reference = BestFit(ShardReader(dataset), 100, True, tmp_path / "reference").rows_per_shard.tolist()
    running = [start_packing(dataset, tmp_path / "shared", 0.1, environment) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in running]
    made = [line for out, _ in outputs for line in out.splitlines() if line.startswith("made")]
    assert sorted(made) == [f"made {shard}" for shard in range(len(dataset.shards))]
    assert all(str(reference) in out for out, _ in outputs), outputs
    assert any("waiting for another process" in err for _, err in outputs)
    assert plan_files(tmp_path / "shared") == plan_files(tmp_path / "reference")


@pytest.mark.parametrize("shards_made", [1, 3])
def test_killed_while_making_it(dataset, tmp_path, environment, shards_made):
    BestFit(ShardReader(dataset), 100, True, tmp_path / "reference")
    process = start_packing(dataset, tmp_path / "killed", 0.2, environment)
    for _ in range(shards_made + 1):
        assert process.stdout.readline().startswith("made")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)
    finished = [name for name in plan_files(tmp_path / "killed") if name != "rows.bin"]
    assert len(finished) == shards_made, "what is finished stays"
    second = start_packing(dataset, tmp_path / "killed", 0, environment)
    out, err = second.communicate(timeout=600)
    assert second.returncode == 0, err
    assert out.count("made") == len(dataset.shards) - shards_made
    assert plan_files(tmp_path / "killed") == plan_files(tmp_path / "reference")


def test_threads_share_a_packing(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "OPEN_SHARDS", 1)
    packed = BestFit(ShardReader(dataset), 50, True, tmp_path)
    expected = list(all_rows(packed))
    failures = []

    def work():
        try:
            for a, b in zip(expected, all_rows(packed), strict=True):
                np.testing.assert_array_equal(a[1], b[1])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_packing_is_fast(dataset):
    """Millions of documents a second are reached; a quadratic step would not come near this bound."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int64), 3, 200_000)
    begun = time.process_time()
    _, sizes = cut(np.cumsum(lengths) - lengths, lengths, 2048)
    best_fit_decreasing(sizes, 2049)
    assert len(lengths) / (time.process_time() - begun) > 10_000
