"""Mixtures and phases: exact shares, every source in its own order, the same batches for every world and resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.shards.manifest import Manifest
from pretrain.stream import mixture as mixture_module
from pretrain.stream.mixture import BLOCK, Cut, Mixture, Phase, consumed, open_phases, quotas
from pretrain.stream.order import Order, hash_key, splitmix64
from pretrain.stream.source import StreamOptions
from pretrain.stream.stream import Rows, Stream, batch_hash
from tests.data_helpers import random_documents, write_dataset

WORLDS = [1, 2, 3, 4, 6, 8, 12, 16, 48]


def test_quotas_by_largest_remainder():
    assert quotas([1.0]).tolist() == [BLOCK]
    assert quotas([3, 1]).tolist() == [3072, 1024]
    assert quotas([1, 1, 1]).tolist() == [1366, 1365, 1365]  # the first of equal remainders gets the odd place
    assert quotas([0.7, 0.2, 0.1]).tolist() == [2867, 819, 410]  # remainders .2, .2, .6
    assert quotas([1e9, 1, 0]).tolist() == [BLOCK, 0, 0]
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = rng.random(rng.integers(1, 20))
        found = quotas(weights)
        assert found.sum() == BLOCK and (abs(found - weights / weights.sum() * BLOCK) < 1).all()


ROWS = {(0, 8): [5000, 3000], (1, 8): [900], (0, 16): [2500, 1500], (1, 16): [450]}  # (source, seq_len) -> by shard


def order_of(source: int, seq_len: int) -> Order:
    return Order(np.array(ROWS[source, seq_len]), seed=7)


def epoch_samples(source: int, cut: Cut) -> int:
    return sum(ROWS[source, cut.whole_len]) * cut.ratio


def places(mixture: Mixture, start: int, end: int) -> list[tuple[int, ...]]:
    found = []
    for n in range(start, end):
        source, place = mixture.locate(np.array([n]), mixture.phase_of_sample(n))
        found.append((int(source[0]), int(place.epoch[0]), int(place.shard[0]), int(place.window[0])))
    return found


def plain_mixture(phase: Phase, seed: int, count: int) -> list[int]:
    """The sources of the first samples of a phase, as the design describes them, without vectors."""
    share, sources = quotas(phase.weights).tolist(), []
    for block in range(-(-count // BLOCK)):
        hashes = splitmix64(hash_key(seed, 3, phase.from_sample, block), BLOCK).tolist()
        line = [source for source, places in enumerate(share) for _ in range(places)]
        sources += [line[i] for i in sorted(range(BLOCK), key=lambda i: (hashes[i] >> 32, i))]
    return sources[:count]


def test_a_source_is_read_as_it_would_be_alone_epoch_after_epoch():
    phases = open_phases([Phase(0, 8, 32, (3.0, 1.0))], (), 0, 7, epoch_samples)
    mixture = Mixture(phases, 7, order_of)
    source, found = mixture.locate(np.arange(3 * BLOCK + 100), phases[0])
    assert source.tolist() == plain_mixture(phases[0], 7, 3 * BLOCK + 100)
    for s in (0, 1):
        mine = source == s
        alone = order_of(s, 8).locate(np.arange(mine.sum()))
        for name in ("epoch", "shard", "window"):
            np.testing.assert_array_equal(getattr(found, name)[mine], getattr(alone, name))
        assert found.epoch[mine].max() == mine.sum() // epoch_samples(
            s, Cut(8, 8)
        )  # the small one is in its fourth epoch
    for block in range(3):
        assert np.bincount(source[block * BLOCK : (block + 1) * BLOCK]).tolist() == [3072, 1024]


def test_any_way_of_asking_gives_the_same_places():
    plan = [Phase(0, 8, 10, (3.0, 1.0)), Phase(500, 8, 30, (1.0, 1.0)), Phase(700, 16, 30, (1.0, 1.0))]
    mixture = Mixture(open_phases(plan, (), 0, 7, epoch_samples), 7, order_of)
    assert [phase.from_sample for phase in mixture.phases] == [0, 5000, 11000]
    rng = np.random.default_rng(0)
    for phase, end in zip(mixture.phases, [5000, 11000, 20000], strict=True):
        numbers = rng.permutation(np.arange(phase.from_sample, end))
        source, found = mixture.locate(numbers, phase)
        some = slice(0, 200)
        again = [places(mixture, n, n + 1)[0] for n in numbers[some].tolist()]
        columns = (source, found.epoch, found.shard, found.window)
        assert again == list(zip(*(column[some].tolist() for column in columns), strict=True))


def test_weights_and_batch_change_without_a_sample_lost_or_seen_twice():
    plan = [Phase(0, 8, 10, (3.0, 1.0)), Phase(500, 8, 30, (1.0, 1.0)), Phase(700, 8, 30, (0.0, 1.0))]
    mixture = Mixture(open_phases(plan, (), 0, 7, epoch_samples), 7, order_of)
    everything = [mixture.locate(np.arange(a, b), phase) for phase, a, b in zip(
        mixture.phases, [0, 5000, 11000], [5000, 11000, 14000], strict=True)]  # fmt: skip
    for s in (0, 1):
        mine = [(found.shard[source == s], found.window[source == s]) for source, found in everything]
        shard, window = (np.concatenate(column) for column in zip(*mine, strict=True))
        alone = order_of(s, 8).locate(np.arange(len(shard)))
        np.testing.assert_array_equal(shard, alone.shard)
        np.testing.assert_array_equal(window, alone.window)
    assert not (everything[2][0] == 0).any()


def test_a_new_sequence_length_begins_the_next_epoch_of_each_source():
    plan = [Phase(0, 8, 10, (3.0, 1.0)), Phase(500, 16, 10, (3.0, 1.0))]
    first, second = open_phases(plan, (), 0, 7, epoch_samples)
    counts = np.bincount(plain_mixture(first, 7, 5000)).tolist()
    assert consumed(first, 5000, 7) == tuple(counts)
    epochs = [-(-count // epoch_samples(s, Cut(8, 8))) for s, count in enumerate(counts)]
    assert epochs == [1, 2] and second.starts == (4000, 900)
    mixture = Mixture((first, second), 7, order_of)
    assert min(epoch for s, epoch, _, _ in places(mixture, 5000, 5200) if s == 0) == 1


def test_the_past_is_as_recorded_and_the_future_as_planned():
    recorded = open_phases([Phase(0, 8, 10, (3.0, 1.0))], (), 0, 7, epoch_samples)
    same = open_phases([Phase(0, 8, 10, (3.0, 1.0))], recorded, 300, 7, epoch_samples)
    assert same == recorded
    changed = open_phases([Phase(0, 8, 20, (3.0, 1.0)), Phase(900, 8, 20, (1.0, 1.0))], recorded, 300, 7, epoch_samples)
    assert [(p.from_step, p.from_sample, p.global_batch_size) for p in changed] == [
        (0, 0, 10), (300, 3000, 20), (900, 15000, 20)]  # fmt: skip
    assert changed[1].starts == consumed(recorded[0], 3000, 7)
    back = open_phases([Phase(0, 8, 10, (3.0, 1.0))], changed, 1000, 7, epoch_samples)
    assert [p.from_step for p in back] == [0, 300, 900, 1000]
    planned = [Phase(0, 8, 10, (3.0, 1.0)), Phase(300, 8, 20, (3.0, 1.0))]
    assert open_phases(planned, recorded, 300, 7, epoch_samples) == open_phases(planned, (), 0, 7, epoch_samples)


def test_the_places_of_a_mixture_are_pinned():
    mixture = Mixture(open_phases([Phase(0, 8, 32, (3.0, 1.0))], (), 0, 7, epoch_samples), 7, order_of)
    assert places(mixture, 0, 4) == PINNED


PINNED = [(1, 0, 0, 270), (1, 0, 0, 64), (0, 0, 0, 270), (0, 0, 0, 64)]  # (source, epoch, shard, window)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("mixture")
    return [
        write_dataset(folder / "large", random_documents(120, 400)),
        write_dataset(folder / "small", random_documents(20, 200, seed=1)),
        write_dataset(folder / "other", random_documents(60, 300, seed=2)),
    ]


PLAN = [Phase(0, 16, 48, (5.0, 1.0, 2.0)), Phase(11, 16, 96, (1.0, 1.0, 2.0)), Phase(17, 32, 48, (1.0, 1.0, 0.0))]
STEPS = 40


@pytest.fixture(params=["window", "best_fit"])
def options(request, tmp_path_factory) -> StreamOptions:
    cache = tmp_path_factory.getbasetemp() / "plans"
    return StreamOptions(packing=request.param, documents=request.param == "best_fit", cache_folder=cache)


def hash_of(parts: list[Rows]) -> str:
    """The hash of a global batch from the rows of its ranks."""
    digests = np.concatenate([part.digests() for part in parts])
    numbers = np.stack([part.sample_numbers for part in parts], axis=1).reshape(-1)
    assert (np.diff(numbers) == 1).all()
    return batch_hash(digests)


def hashes(sources, options, world: int, start: int, end: int, state: dict | None = None) -> list[str]:
    """The hashes of the global batches start ... end - 1, read by all ranks of an emulated world."""
    streams = [Stream(sources, PLAN, 5, rank, world, options) for rank in range(world)]
    for stream in streams if state else ():
        stream.resume(state, start)
    batches = [stream.batches(start) for stream in streams]
    found = [hash_of([next(batch) for batch in batches]) for _ in range(start, end)]
    for batch in batches:
        batch.close()
    return found


def test_every_world_sees_the_same_global_batches_over_epochs_sources_and_phases(sources, options):
    expected = hashes(sources, options, 1, 0, STEPS)
    assert len(set(expected)) == STEPS
    epochs = [facts["epochs"] for facts in Stream(sources, PLAN, 5, options=options).summary(STEPS)]
    assert epochs[1] > 2  # the small source comes round more than once
    for world in WORLDS[1:]:
        assert hashes(sources, options, world, 0, STEPS) == expected, f"world {world}"


def test_resumes_at_random_steps_with_other_worlds_are_the_undisturbed_run(sources, options):
    expected = hashes(sources, options, 1, 0, STEPS)
    rng = np.random.default_rng(options.documents)
    for _ in range(6):
        first, second = sorted(rng.choice(np.arange(1, STEPS), 2, replace=False).tolist())
        worlds = rng.choice(WORLDS, 3).tolist()
        found = hashes(sources, options, worlds[0], 0, first)
        for world, start, end in ((worlds[1], first, second), (worlds[2], second, STEPS)):
            before = Stream(sources, PLAN, 5, 0, 1, options)
            state = json.loads(json.dumps(before.state(start)))
            found += hashes(sources, options, world, start, end, state)
        assert found == expected, f"resumed at {first} and {second} with worlds {worlds}"


def test_resumes_where_an_epoch_or_a_phase_ends(sources, options):
    expected = hashes(sources, options, 1, 0, STEPS)
    stream = Stream(sources, PLAN, 5, options=options)
    epochs = [{(p["source"], p["epoch"]) for p in stream.places(stream.numbers(step))} for step in range(STEPS)]
    turns = [step for step in range(1, STEPS) if not epochs[step] <= epochs[step - 1]]
    assert len(turns) > 3 and {11, 17} & set(turns) == {17}  # a new length begins new epochs, new weights do not
    for step in {11, 17, *turns[:3], turns[-1]}:
        for start in (step, step + 1):  # before the batch that turns over, and after it
            state = json.loads(json.dumps(Stream(sources, PLAN, 5, options=options).state(start)))
            assert hashes(sources, options, 3, start, STEPS, state) == expected[start:]


def test_a_resume_with_another_plan_opens_a_phase_and_all_later_resumes_know_it(sources):
    options = StreamOptions()
    stream = Stream(sources, [Phase(0, 16, 48, (1.0, 1.0, 1.0))], 5, options=options)
    state = json.loads(json.dumps(stream.state(7)))
    changed = [Phase(0, 32, 24, (1.0, 2.0, 0.0))]
    went_on = Stream(sources, changed, 5, options=options)
    went_on.resume(state, 7)
    assert [(p.from_step, p.from_sample, p.seq_len) for p in went_on.phases] == [(0, 0, 16), (7, 336, 32)]
    assert went_on.progress(10) == (336 + 3 * 24, 336 * 16 + 3 * 24 * 32)
    later = Stream(sources, changed, 5, options=options)
    later.resume(json.loads(json.dumps(went_on.state(9))), 9)
    assert later.phases == went_on.phases
    batches = later.batches(9)
    np.testing.assert_array_equal(next(batches).tokens, went_on.rows(went_on.numbers(9)).tokens)
    batches.close()
    for step in (0, 6):  # the past can still be asked for
        np.testing.assert_array_equal(later.rows(later.numbers(step)).tokens, stream.rows(stream.numbers(step)).tokens)


def test_a_source_too_short_for_a_row_is_no_trouble_while_it_has_no_weight(sources):
    plan = [Phase(0, 1000, 2, (1.0, 0.0, 0.0)), Phase(3, 16, 48, (1.0, 1.0, 0.0))]
    short = write_dataset(Path(sources[0].location).parent / "short", random_documents(60, 30, seed=4))
    stream = Stream([sources[0], short, sources[2]], plan, 5)
    assert [facts["rows"] for facts in stream.summary(2)][1] == 0
    assert stream.phases[1].starts[1] == 0 and len(stream.rows(stream.numbers(3)).tokens) == 48


def test_weights_that_cannot_be_kept_and_sources_that_are_too_small_are_refused(sources):
    with pytest.raises(ValueError, match="the weight 1e-06 of .*small .* none of 4096 samples"):
        Stream(sources, [Phase(0, 16, 48, (1.0, 1e-6, 1.0))], 5)
    Stream(sources, [Phase(0, 16, 48, (1.0, 0.0, 1.0))], 5)
    with pytest.raises(ValueError, match="small holds .* samples of 512 tokens, fewer than the .* of one batch"):
        Stream(sources, [Phase(0, 512, 48, (1.0, 9.0, 0.0))], 5)
    with pytest.raises(ValueError, match="does not divide into 5 ranks"):
        Stream(sources, [Phase(0, 16, 50, (1.0, 1.0, 1.0)), Phase(9, 16, 48, (1.0, 1.0, 1.0))], 5, 0, 5)


def test_blocks_are_remembered_not_recomputed(monkeypatch):
    made = []
    block = mixture_module._block
    monkeypatch.setattr(mixture_module, "_block", lambda *what: made.append(what[1]) or block(*what))
    mixture = Mixture(open_phases([Phase(0, 8, 32, (3.0, 1.0))], (), 0, 7, epoch_samples), 7, order_of)
    for start in range(0, 2 * BLOCK, 32):
        mixture.locate(np.arange(start, start + 32), mixture.phases[0])
    assert made == [0, 1]
