"""Phases of several lengths read one epoch: every token once whatever the lengths, and pieces of a window far apart."""

import json

import numpy as np
import pytest

from pretrain.shards.manifest import Manifest
from pretrain.stream.mixture import Phase
from pretrain.stream.order import BLOCK
from pretrain.stream.pieces import BlockOrders, Stretch
from pretrain.stream.source import StreamOptions
from pretrain.stream.stream import Stream
from tests.data_helpers import random_documents, write_dataset

EPOCH = 10 * BLOCK


def located(stretch: Stretch, start: int, end: int) -> list[tuple[int, int]]:
    whole, piece = stretch.locate(np.arange(start, end), BlockOrders(7))
    return list(zip(whole.tolist(), piece.tolist(), strict=True))


@pytest.mark.parametrize("ratio, rows", [(2, 50), (2, 3 * BLOCK + 5), (4, BLOCK), (3, BLOCK + 1), (8, 1)])
def test_a_planned_stretch_is_all_pieces_of_just_as_many_wholes(ratio, rows):
    stretch = Stretch(ratio, EPOCH, origin=10 * ratio, end=10 * ratio + rows)
    found = located(stretch, stretch.origin, stretch.end)
    wholes = -(-rows // ratio)
    assert len(set(found)) == rows and {whole for whole, _ in found} <= set(range(10, 10 + wholes))
    assert wholes * ratio - rows < ratio and stretch.used_before(stretch.end) == 10 + wholes
    later = located(stretch, stretch.end, stretch.end + 100)  # it went on beyond its plan
    assert len(set(later)) == 100 and min(later)[0] >= 10 + wholes
    assert located(stretch, stretch.origin, stretch.end + 100) == found + later


def test_what_an_open_stretch_has_touched_is_its_blocks():
    size = BLOCK // 4
    stretch = Stretch(4, 100 * size, origin=0)
    assert [stretch.used_before(row) for row in (0, 1, BLOCK, BLOCK + 1)] == [0, size, size, 2 * size]
    assert Stretch(1, EPOCH, origin=0).used_before(17) == 17
    planned = Stretch(4, 100 * size, origin=0, end=BLOCK + 10)  # too little for two blocks
    assert [planned.used_before(row) for row in (1, BLOCK, BLOCK + 10)] == [size + 3] * 3
    assert planned.used_before(BLOCK + 11) > 2 * size + 3  # of the stretch after it


def test_blocks_are_of_nearly_the_same_size():
    """A small last one would put the pieces of a whole next to each other."""
    for wholes in (1, 5, BLOCK // 4 + 1, 3 * BLOCK // 4 - 1, BLOCK):
        stretch, sizes, whole = Stretch(4, wholes, origin=0), [], 0
        while whole < wholes:
            start, stop = stretch.block(whole)
            assert start == whole and all(stretch.block(each) == (start, stop) for each in (whole, stop - 1))
            sizes.append(4 * (stop - start))
            whole = stop
        assert sum(sizes) == 4 * wholes and max(sizes) < 2 * BLOCK and min(sizes) >= min(4 * wholes, BLOCK)


def test_no_block_is_of_two_epochs():
    """A small source is read once, in one mixture of all its pieces, before any of it comes again."""
    stretch = Stretch(4, 25, origin=40)
    found = located(stretch, 40, 600)
    assert sorted(found[:60]) == [(whole, piece) for whole in range(10, 25) for piece in range(4)]
    for epoch in range(1, 6):
        rows = found[100 * epoch - 40 : 100 * epoch + 60]
        wholes = range(25 * epoch, 25 * (epoch + 1))
        assert sorted(rows) == [(whole, piece) for whole in wholes for piece in range(4)]
    assert [stretch.used_before(row) for row in (41, 100, 101)] == [25, 25, 50]


def test_pieces_of_a_whole_lie_far_apart_and_any_rows_can_be_asked_for():
    stretch = Stretch(4, EPOCH, origin=0)
    found = located(stretch, 0, 2 * BLOCK)
    assert sorted(found[:BLOCK]) == [(whole, piece) for whole in range(BLOCK // 4) for piece in range(4)]
    row = {place: number for number, place in enumerate(found)}
    distances = [abs(row[whole, 0] - row[whole, 1]) for whole in range(BLOCK // 2)]
    assert np.mean(distances) > BLOCK / 4
    rows = np.random.default_rng(0).permutation(2 * BLOCK)[:500]
    whole, piece = stretch.locate(rows, BlockOrders(7))
    assert list(zip(whole.tolist(), piece.tolist(), strict=True)) == [found[number] for number in rows.tolist()]


def test_pieces_are_pinned():
    """Runs that exist depend on them."""
    assert located(Stretch(4, EPOCH, origin=8, end=24), 8, 13) == PINNED


PINNED = [(3, 3), (2, 1), (3, 0), (5, 0), (5, 2)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("pieces")
    texts = ((120, 400, 0), (20, 200, 1))
    return [write_dataset(folder / str(seed), random_documents(*size, seed=seed)) for *size, seed in texts]


def phases(*settings: tuple[int, int], batch: int = 48) -> list[Phase]:
    return [Phase(step, seq_len, batch, (3.0, 1.0)) for step, seq_len in settings]


def read(stream: Stream, manifests: list[Manifest], steps: range, longest: int = 64) -> list[np.ndarray]:
    """Of each source, how often each token place of each epoch is read, int64[epochs, tokens of whole windows]."""
    counts = [np.zeros((40, int(m.windows_per_shard(longest).sum()) * longest), dtype=np.int64) for m in manifests]
    for step in steps:
        phase = stream.phase_of_step(step)
        assert phase.cut.whole_len == longest
        for place in stream.places(stream.numbers(step)):
            (s,) = [s for s, m in enumerate(manifests) if m.location == place["source"]]
            names = [entry.name for entry in manifests[s].shards]
            before = int(manifests[s].windows_per_shard(longest)[: names.index(place["shard"])].sum()) * longest
            start = before + place["row"] * phase.seq_len  # row r is piece r % ratio of whole r // ratio
            counts[s][place["epoch"], start : start + phase.seq_len] += 1
    return counts


PLAN = phases((0, 16), (20, 64), (30, 32), (45, 64))
STEPS = 60


def test_an_epoch_is_read_once_whatever_the_lengths(sources):
    """Between two lengths less than a whole of each source is left; nothing is read twice before the epoch is over."""
    stream = Stream(sources, PLAN, 5)
    for counts in read(stream, sources, range(STEPS)):
        assert counts.max() == 1
        begun = np.flatnonzero(counts.any(axis=1))
        assert len(begun) >= 3 and (np.diff(begun) == 1).all()
        unread = counts.shape[1] - counts[begun[:-1]].sum(axis=1)
        assert unread.sum() < 3 * 64  # three changes of the length
    rows = stream.rows(stream.numbers(20))
    assert rows.tokens.shape == (48, 65) and not stream.phases[1].left


def test_a_piece_is_the_tokens_that_its_window_has_there(sources):
    pieces, wholes = Stream(sources[:1], [Phase(0, 16, 8, (1.0,)), Phase(9, 64, 8, (1.0,))], 5), sources[0]
    whole = Stream.in_order(wholes, 64)
    text = whole.rows(np.arange(whole.epoch_samples))
    starts = np.concatenate([[0], np.cumsum(wholes.windows_per_shard(64))])
    names = [entry.name for entry in wholes.shards]
    for number in range(40):
        (place,), rows = pieces.places(np.array([number])), pieces.rows(np.array([number]))
        window, piece = divmod(place["row"], 4)
        window += starts[names.index(place["shard"])]
        of_window = text.tokens[window, piece * 16 : piece * 16 + 17]
        np.testing.assert_array_equal(rows.tokens[0], of_window)
        assert rows.is_target[0, -1] == text.is_target[window, piece * 16 + 15] and rows.is_target[0, :-1].all()


def test_a_run_of_one_length_has_the_order_it_always_had(sources):
    one, first = Stream(sources, phases((0, 64)), 5), Phase(0, 64, 48, (3.0, 1.0), whole_len=0)
    before = Stream(sources, [first], 5)
    for step in (0, 7, 30):
        assert one.places(one.numbers(step)) == before.places(before.numbers(step))
    state = json.loads(json.dumps(one.state(7)))
    for name in ("whole_len", "origins", "ends", "left"):  # as version 1 kept it
        del state["phases"][0][name]
    del state["version"]
    went_on = Stream(sources, phases((0, 64)), 5)
    went_on.resume(state, 7)
    assert went_on.places(went_on.numbers(30)) == one.places(one.numbers(30))


def test_what_an_earlier_version_recorded_keeps_its_meaning(sources):
    """It began a new epoch where the length changed; its rows of the past stay what they were."""
    recorded = Phase(0, 16, 48, (3.0, 1.0), starts=(0, 0))
    old = Stream(sources, [recorded], 5)
    state = json.loads(json.dumps(old.state(12)))
    state["phases"] = [{name: state["phases"][0][name] for name in
                        ("from_step", "seq_len", "global_batch_size", "weights", "from_sample", "starts")}]  # fmt: skip
    went_on = Stream(sources, PLAN, 5)
    went_on.resume(state, 12)
    assert went_on.places(went_on.numbers(3)) == old.places(old.numbers(3))
    phase = went_on.phase_of_step(20)
    sizes = [int(manifest.windows_per_shard(64).sum()) for manifest in sources]
    assert [start % size for start, size in zip(phase.starts, sizes, strict=True)] == [0, 0] and max(phase.left) > 0
    with pytest.raises(ValueError, match="of a newer version"):
        went_on.resume(state | {"version": 3}, 12)


def resumed(before: Stream, step: int, sources: list[Manifest], plan: list[Phase]) -> Stream:
    stream = Stream(sources, plan, 5)
    stream.resume(json.loads(json.dumps(before.state(step))), step)
    return stream


def test_a_resume_at_any_step_reads_what_an_undisturbed_run_reads(sources):
    """Also where a phase begins that changes nothing of the order: only the micro-batch, say."""
    plan = [*phases((0, 16), (5, 16)), Phase(9, 16, 24, (3.0, 1.0)), *phases((12, 64), (15, 64), (18, 32))]
    whole = Stream(sources, plan, 5)
    for step in range(1, 24):
        again = resumed(whole, step, sources, plan)
        assert again.phases == whole.phases
        assert again.places(again.numbers(step)) == whole.places(whole.numbers(step))


@pytest.mark.parametrize("is_first_version", [False, True])
def test_another_batch_goes_on_in_the_epoch_whatever_else_is_planned(sources, is_first_version):
    """A longer length far ahead, or one that is given up, is no reason to leave anything behind."""
    short = [Phase(0, 16, 48, (3.0, 1.0))]
    batch, longer = Phase(10, 16, 24, (1.0, 1.0)), Phase(50, 64, 48, (3.0, 1.0))
    for begun, plan in ((short, [*short, batch, longer]), ([*short, longer], [*short, batch])):
        before = Stream(sources, begun, 5)
        if is_first_version:
            before = Stream(sources, short, 5)
        now = resumed(before, 8, sources, plan)
        (at,) = [phase for phase in now.phases if phase.from_step == 10]
        assert not at.left and at.cut == before.phases[0].cut
    planned = Stream(sources, phases((0, 16), (20, 64)), 5)
    more = resumed(planned, 10, sources, phases((0, 16), (20, 64), (40, 128)))
    assert [bool(phase.left) for phase in more.phases] == [False, False, True], "what was planned before still is"
    assert "rows of 128 tokens were not planned when those of 64 began" in more.phase_summary(50)[2]["reason"]


@pytest.mark.parametrize("moved", [16, 26])
def test_a_plan_that_changes_reads_nothing_twice_and_says_what_is_left(sources, moved):
    """The end of the first length was planned for step 20."""
    before = Stream(sources, PLAN, 5)
    state = json.loads(json.dumps(before.state(14)))
    changed = Stream(sources, phases((0, 16), (moved, 64)), 5)
    changed.resume(state, 14)
    assert [phase.from_step for phase in changed.phases] == [0, moved]
    counts = read(before, sources, range(14)), read(changed, sources, range(14, 40))
    assert all((past + now).max() == 1 for past, now in zip(*counts, strict=True))
    summary = changed.phase_summary(40)[1]
    unread = [int((1 - (past + now)[: now.any(axis=1).sum() - 1]).sum()) for past, now in zip(*counts, strict=True)]
    assert (
        max(summary["left"]) * 16 >= 64
        and summary["reason"] == "the rows of 16 tokens were planned to end at another step"
    )
    assert [0 <= rows * 16 - tokens < 64 or tokens == 0 for rows, tokens in zip(summary["left"], unread, strict=True)]


def test_lengths_that_do_not_divide_and_packed_documents_begin_a_new_epoch_and_say_so(sources, tmp_path):
    windows = Stream(sources, phases((0, 48), (10, 64)), 5)
    packed = Stream(
        sources, phases((0, 32), (10, 64)), 5, options=StreamOptions(packing="best_fit", cache_folder=tmp_path)
    )
    for stream, reason in (
        (windows, "rows of 64 tokens are not made of rows of 48"),
        (packed, "best_fit packs the documents anew for each length"),
    ):
        first, second = stream.phase_summary(30)
        assert (first["left"], first["reason"], second["reason"]) == ([], None, reason)
        begun = [-(-epochs // 1) for epochs in first["epochs"]]
        sizes = [read / epochs for read, epochs in zip(first["samples"], first["epochs"], strict=True)]
        left = [round(epoch * size) - read for epoch, size, read in zip(begun, sizes, first["samples"], strict=True)]
        assert second["left"] == left and max(left) > 0


def test_a_source_without_text_that_long_keeps_its_own_rows(sources, tmp_path):
    short = write_dataset(tmp_path / "short", random_documents(60, 40, seed=4), chunk_tokens=40, shard_tokens=400)
    with pytest.raises(ValueError, match="holds 0 samples of 64 tokens"):
        Stream([sources[0], short], phases((0, 16), (10, 64)), 5)
    stream = Stream([sources[0], short], [Phase(0, 16, 48, (3.0, 1.0)), Phase(10, 64, 48, (1.0, 0.0))], 5)
    assert [phase.cut.whole_len for phase in stream.phases] == [16, 64]


def test_a_batch_that_no_pieces_suffice_for_names_the_length_that_makes_them_few(sources):
    rows = 4 * int(sources[1].windows_per_shard(64).sum())
    with pytest.raises(
        ValueError, match=f"at most {rows} of them or no phase of 64 tokens, of whose windows these are"
    ):
        Stream(sources[1:], [Phase(0, 16, rows + 1, (1.0,)), Phase(9, 64, 8, (1.0,))], 5)
    Stream(sources[1:], [Phase(0, 16, rows, (1.0,)), Phase(9, 64, 8, (1.0,))], 5)


def test_figures_are_of_what_is_read(sources):
    stream = Stream(sources, [Phase(0, 16, 48, (3.0, 1.0)), Phase(10, 64, 48, (3.0, 2.0))], 5)
    first, second = stream.phase_summary(14)
    assert (sum(first["samples"]), sum(second["samples"])) == (480, 4 * 48)
    sizes = [int(manifest.windows_per_shard(64).sum()) for manifest in sources]
    assert first["epochs"] == [read / 4 / size for read, size in zip(first["samples"], sizes, strict=True)]
    facts = stream.summary(14)
    tokens = [16 * a + 64 * b for a, b in zip(first["samples"], second["samples"], strict=True)]
    assert [fact["share"] for fact in facts] == [each / sum(tokens) for each in tokens]
    assert [fact["epochs"] for fact in facts] == [a + b for a, b in zip(first["epochs"], second["epochs"], strict=True)]
    assert facts[0]["rows"] == sizes[0] and stream.phase_summary(10) == [first]
