"""How many threads a rank alone on a CPU takes."""

import json

import pytest
import torch

from pretrain import dist, threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv(threads.SET, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch):
    """machine(seconds of each number of threads): one that works that fast."""

    def of(seconds: dict[int, float], busy_until: float = 0.0) -> None:
        now, computed = [0.0], [0.0]

        def work(rows: int) -> None:
            count = torch.get_num_threads()
            is_shared = count == max(seconds) and now[0] < busy_until
            now[0] += seconds[count] * (5 if is_shared else 1)
            computed[0] += seconds[count] * count * (2 if is_shared else 1)

        monkeypatch.setattr(threads, "_work", work)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(threads.time, "process_time", lambda: computed[0])

    return of


@pytest.mark.parametrize("seconds, expected", [
    ({8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}, 8),
    ({8: 1.0, 4: 0.8, 2: 1.5, 1: 3.0}, 4),  # hyperthreads that stand in each other's way
    ({8: 1.0, 4: 0.95, 2: 1.5, 1: 3.0}, 8),  # as fast but for chance
    ({8: 9.0, 4: 6.0, 2: 1.0, 1: 2.0}, 2),  # a container of two of eight cores
    ({1: 1.0}, 1),
    ({6: 1.0, 3: 0.7, 1: 2.0}, 3),
])  # fmt: skip
def test_the_fastest_number_of_threads_is_found(machine, seconds, expected):
    machine(seconds)
    assert threads.fastest(max(seconds)) == expected


@pytest.mark.parametrize("busy_until, expected", [(0.5, 2), (4.0, 2), (1000.0, 1)])
def test_who_takes_a_core_for_a_moment_decides_nothing(machine, busy_until, expected):
    machine({2: 0.01, 1: 0.02}, busy_until)
    assert threads.fastest(2) == expected


def test_a_run_keeps_its_threads_while_the_machine_has_them(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(threads, "fastest", lambda cores: tried.append(cores) or 1)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: range(4))
    assert threads.settle(tmp_path, dist.ALONE, CPU) == 1 and tried == [4]
    start = {"kind": "start", "device": "cpu", "ranks": 1, "threads": 3}
    others = [{"ranks": 2, "threads": 2}, {"device": "cuda", "threads": 6}, {"kind": "saved", "threads": 2}]
    events = [start | {"threads": 2}, start, *(start | other for other in others)]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert threads.settle(tmp_path, dist.ALONE, CPU) == torch.get_num_threads() == 3 and tried == [4]
    assert "with 3 of 4 threads" in threads.note(dist.ALONE, CPU) and "OMP_NUM_THREADS=4" in threads.note(
        dist.ALONE, CPU
    )
    torch.set_num_threads(4)
    assert threads.note(dist.ALONE, CPU) is None
    (tmp_path / "events.jsonl").write_text(json.dumps(start | {"threads": 5}))
    assert threads.settle(tmp_path, dist.ALONE, CPU) == 1 and tried == [4, 4]


def test_what_is_said_stands_and_several_ranks_share_what_they_were_given(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "fastest", lambda cores: pytest.fail("tried"))
    torch.set_num_threads(2)
    assert threads.settle(tmp_path, dist.Ranks(0, 2, 0), CPU) == 2
    assert threads.settle(tmp_path, dist.ALONE, torch.device("cuda")) == 2
    monkeypatch.setenv(threads.SET, "2")
    assert threads.settle(tmp_path, dist.ALONE, CPU) == torch.get_num_threads() == 2
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: range(4))
    assert threads.note(dist.ALONE, CPU) is None, "it was asked for"
