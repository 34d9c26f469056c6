"""Where parts of a checkpoint lie, by pure functions: files of many ranks, and an 8B model on 1,024 of them, unwritten.

Of that there are the files' real headers, made from the ranks' fragments as a save does, with holes instead of data.
"""

import bisect
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import sections
from pretrain.checkpoint.manifest import MANIFEST, Header, Reader
from pretrain.checkpoint.placement import (
    Listing,
    Placed,
    describe,
    file_name,
    held_by,
    merged,
    ranks_of_files,
    stretches,
    tensor_key,
)
from pretrain.checkpoint.save import FILE_BYTES, manifest_of
from pretrain.checkpoint.sections import Section, cut, share_out
from pretrain.checkpoint.staging import arranged
from pretrain.config import compose
from pretrain.dist import Ranks
from pretrain.engine.fragments import Fragment
from pretrain.model.heads import parameter_shapes

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SAVED, RANKS_PER_NODE = 1024, 8
SHAPES = parameter_shapes(
    compose.compose("pretrain", ["run.name=x", "model=llama_8b", "model.vocab_size=128256"]).model
)
SIZES = [torch.Size(shape).numel() for shape in SHAPES.values()]
ENDS = list(itertools.accumulate(SIZES))
MEGABYTE = 10**6


def ranges(stage: int, world: int, rank: int) -> Iterator[tuple[str, int, int]]:
    """(parameter, offset, numel) of what a rank owns: stage 3 cuts each parameter, stage 1 all of them end to end."""
    if stage == 3:
        for name, numel in zip(SHAPES, SIZES, strict=True):
            width = -(-numel // world)
            if (count := min(width, numel - rank * width)) > 0:
                yield name, rank * width, count
        return
    width = -(-ENDS[-1] // world)
    low, high = rank * width, min(ENDS[-1], (rank + 1) * width)
    names = list(SHAPES)
    for number in range(bisect.bisect_right(ENDS, low), len(names)):
        begin = ENDS[number] - SIZES[number]
        if begin >= high:
            return
        start, end = max(low, begin), min(high, ENDS[number])
        yield names[number], start - begin, end - start


@functools.cache
def nowhere(numel: int) -> torch.Tensor:
    return torch.empty(numel, device="meta")


def fragments(stage: int, world: int, rank: int) -> list[Fragment]:
    return [Fragment(name, kind, offset, SHAPES[name], nowhere(numel))
            for name, offset, numel in ranges(stage, world, rank) for kind in KINDS]  # fmt: skip


@functools.cache
def listings_of(stage: int) -> list[Listing]:
    """What each rank would save."""
    return [arranged(fragments(stage, SAVED, rank), rank)[1] for rank in range(SAVED)]


def placed_by(stage: int, limit_bytes: int) -> tuple[Placed, list[bytes], bytes]:
    """Where 1,024 ranks write, the headers of the files, and the manifest."""
    listings = listings_of(stage)
    sizes = [listing.bytes for listing in listings]
    files = ranks_of_files([rank // RANKS_PER_NODE for rank in range(SAVED)], sizes, limit_bytes)
    found = [describe([listings[rank] for rank in ranks]) for ranks in files]
    headers = [0] * SAVED
    for ranks, (header, _) in zip(files, found, strict=True):
        headers[ranks[0]] = len(header)
    placed = Placed(files, stretches(files, sizes, headers), b"", [content for _, content in found])
    hashes = {rank: [Section(*place, "0" * 64) for place in cut(*placed.stretches[rank])] for rank in range(SAVED)}
    return placed, [header for header, _ in found], manifest_of(Header(1, "adamw", 1, {}, {}), placed, hashes)


@pytest.fixture(scope="module", params=[3, 1], ids=lambda stage: f"zero{stage}")
def hollow(request, tmp_path_factory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("hollow")
    placed, headers, manifest = placed_by(request.param, FILE_BYTES)
    assert len(placed.files) == SAVED / RANKS_PER_NODE, "a node's 0.75 GB are one file"
    for number, (ranks, header) in enumerate(zip(placed.files, headers, strict=True)):
        (folder / file_name(number)).write_bytes(header)
        os.truncate(folder / file_name(number), placed.bytes_of(ranks))
    (folder / MANIFEST).write_bytes(manifest)
    return request.param, folder


def test_the_manifest_of_a_thousand_ranks_is_small(hollow):
    assert (hollow[1] / MANIFEST).stat().st_size < 1.5 * MEGABYTE


def test_it_stays_within_bounds_when_each_rank_has_a_file():
    placed, _, manifest = placed_by(3, 1)
    assert len(placed.files) == SAVED and len(manifest) < 10 * MEGABYTE


@pytest.mark.parametrize("world", [8, 64, 1000, 1024])
def test_a_resume_opens_what_it_needs_and_reads_its_share(hollow, world):
    stage, folder = hollow
    for rank in (0, world // 2 + 1, world - 1):
        reader, mine = Reader(folder), 0
        for fragment in fragments(stage, world, rank):
            found = list(reader.pieces(fragment.name, fragment.kind, fragment.offset, fragment.values.numel()))
            places = sorted((place, place + end - start) for _, _, start, end, place in found)
            assert [low for low, _ in places] == [0, *(high for _, high in places[:-1])], "each number is found once"
            assert places[-1][1] == fragment.values.numel()
            mine += places[-1][1]
        assert mine <= -(-ENDS[-1] // world) * len(KINDS) + len(SIZES) * len(KINDS), "its share of the numbers"
        assert len(reader.open) <= SAVED / RANKS_PER_NODE / world + 2
        headers = 0
        for name in reader.open:
            with open(folder / name, "rb") as file:
                headers += 8 + int.from_bytes(file.read(8), "little")
        assert (folder / MANIFEST).stat().st_size + headers < 10 * MEGABYTE


@pytest.mark.parametrize("world", [8, 1000, 1024])
def test_verification_is_shared_out(hollow, world):
    """Every byte is verified by one rank, and no rank has more than its share and a section."""
    reader, places, most = Reader(hollow[1]), [], 0
    for rank in range(world):
        share = [(file.name, section.start, section.end) for file, section in reader.share_of(Ranks(rank, world, 0))]
        most = max(most, sum(end - start for _, start, end in share))
        places += share
    assert places == [(file.name, section.start, section.end) for file in reader.files for section in file.sections]
    total = sum(file.bytes for file in reader.files)
    assert sum(end - start for _, start, end in places) == total
    assert most <= total / world + max(end - start for _, start, end in places)


def test_a_long_part_is_cut_into_sections_so_that_it_can_be_shared(monkeypatch):
    monkeypatch.setattr(sections, "SECTION_BYTES", 100)
    assert cut(50, 275) == [(50, 150), (150, 250), (250, 275)] and cut(7, 7) == []
    assert share_out([100, 100, 25], 3) == [0, 2, 2], "by where the middle lies"
    assert share_out([10] * 12, 4) == [rank for rank in range(4) for _ in range(3)]


@pytest.mark.parametrize(
    "nodes, sizes, limit, files",
    [
        ([7, 7, 7, 7], [4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([7, 7, 9, 9], [1, 1, 1, 1], 100, [[0, 1], [2, 3]]),  # never two nodes to a file
        ([7, 9, 7, 9], [1, 1, 1, 1], 100, [[0, 2], [1, 3]]),
        ([7, 7, 7], [50, 1, 1], 8, [[0], [1, 2]]),  # a part is never cut
        ([7, 7, 7, 9], [50, 90, 1, 1], 0, [[0, 1, 2], [3]]),  # one a node
        ([7, 7, 7, 7], [5, 0, 0, 5], 100, [[0, 3]]),  # nothing to write
        ([7, 9], [0, 0], 100, []),
    ],
)
def test_which_ranks_fill_a_file(nodes, sizes, limit, files):
    assert ranks_of_files(nodes, sizes, limit) == files
    placed = stretches(files, sizes, [16 if rank in {ranks[0] for ranks in files} else 0 for rank in range(len(sizes))])
    for ranks in files:
        ends = [placed[rank] for rank in ranks]
        assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == 16 + sum(sizes[rank] for rank in ranks)


def test_ranges_are_listed_once_and_neighbours_are_one():
    assert merged([(10, 5), (0, 10), (20, 5), (15, 2), (22, 3)]) == [0, 17, 20, 5]
    key = tensor_key("a.b:c", ["weight", "exp_avg"], 40)
    assert [(h.name, h.kind, h.offset, h.numel, h.start) for h in held_by(key, 14)] == [
        ("a.b:c", "weight", 40, 7, 0), ("a.b:c", "exp_avg", 40, 7, 7)]  # fmt: skip
