"""The preparation at scale: parts, executors, crashes at every step, full disks, filters and duplicates end to end."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import STOPPED
from pretrain.prepare import parts, workers
from pretrain.prepare.finding import find_files
from pretrain.prepare.plan import Settings, make_plan
from pretrain.prepare.workers import Executor, _Task
from pretrain.shards import manifest as manifests
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests import forked
from tests.data_helpers import python_like_text
from tests.forked import ROOT
from tools import write_shards

TOOL = ROOT / "tools" / "write_shards.py"
PART_BYTES = 6288  # what --shard-mb 0.003 cuts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train([python_like_text(60, seed) for seed in range(40)], vocab_size=700))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """13 parts of PART_BYTES: a JSONL file that is cut into ranges, and text files."""
    root = tmp_path_factory.mktemp("source")
    lines = [json.dumps({"text": python_like_text(random.Random(i).randint(1, 40), seed=i)}) for i in range(60)]
    (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(20):
        (root / f"b{i:02d}.py").write_text(python_like_text(60, seed=1000 + i))
    return root


@pytest.fixture(scope="module")
def arguments(source, tokenizer) -> list[str]:
    argv = ["--input", source, "--tokenizer", tokenizer.path, "--val-fraction", 0.2, "--shard-mb", 0.003]
    return [str(a) for a in argv + ["--chunk-tokens", 500, "--threads", 1]]


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory) -> dict[str, bytes]:
    """Every file of the output of a run that was left alone."""
    output = tmp_path_factory.mktemp("expected") / "out"
    write_shards.main([*arguments, "--output", str(output)])
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*argv, **options) -> subprocess.CompletedProcess:
    command = forked.program(TOOL, *argv)
    return subprocess.run(command, env=forked.ENVIRONMENT, timeout=600, capture_output=True, text=True, **options)


def partial_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.write_shards-partial")


def finished_parts(output: Path) -> dict[str, tuple[int, int]]:
    """The finished parts, each proven whole: every file as done.json has it. Name -> (inode, mtime) of done.json."""
    found = {}
    for folder in partial_folder(output).glob("parts/?????"):
        done = json.loads((folder / "done.json").read_bytes())
        for split, shards in done["shards"].items():
            assert len(list((folder / split).glob("*.tar"))) == len(shards)
            for shard in shards:
                store = manifests.Store(str(folder / split))
                one = manifests.Manifest(store, "<u2", 500, True, "", 700, {}, (manifests.Shard(**shard),))
                assert (folder / split / shard["name"]).stat().st_size == shard["bytes"]
                one.chunks(0)
        found[folder.name] = ((folder / "done.json").stat().st_ino, (folder / "done.json").stat().st_mtime_ns)
    return found


def test_the_input_is_cut_the_same_way_whoever_reads_it(source, tokenizer, tmp_path):
    plan = make_plan(tmp_path, "run", find_files([source]).files, tokenizer, Settings(shard_tokens=PART_BYTES // 4))
    size = (source / "a.jsonl").stat().st_size
    cuts = [(p.pieces[0].start, p.pieces[0].end) for p in plan.parts if p.pieces[0].path.name == "a.jsonl"]
    assert cuts == [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)] and len(cuts) > 7
    rest = [piece.path.name for part in plan.parts for piece in part.pieces if piece.path.name != "a.jsonl"]
    assert rest == [f"b{i:02d}.py" for i in range(20)]
    assert all(PART_BYTES <= part.bytes < 2.5 * PART_BYTES for part in plan.parts[:-1])
    assert len({part.key for part in plan.parts}) == len(plan.parts) == 13


def test_compressed_input_counts_four_times(tokenizer, tmp_path):

    for i in range(8):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(os.urandom(100), mtime=0))  # 123 bytes on disk
    plan = make_plan(tmp_path, "run", find_files([tmp_path]).files, tokenizer, Settings(shard_tokens=246))
    assert [len(part.pieces) for part in plan.parts] == [2, 2, 2, 2]


def test_any_executor_writes_the_same_bytes(arguments, expected, tmp_path):
    """One process is `expected`; two and four on this machine, and two jobs of submitit."""
    assert len([name for name in expected if name.endswith(".tar")]) > 15
    for name, executor in {"two": ["--workers", 2], "four": ["--workers", 4],
                           "jobs": ["--workers", 2, "--cluster", "local"]}.items():  # fmt: skip
        done = run(*arguments, "--output", tmp_path / name, *executor)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / name) == expected, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "jobs", "two"]


def die_at(count: int, argv: list[str]) -> int:
    """Run the tool in a forked process that dies, as by kill -9, before its `count`-th change of the disk."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = [count]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        write_shards.main(argv)
    finally:
        os._exit(0)


def test_killed_at_every_step(source, arguments, tmp_path):
    """Each run dies one step later than the one before: never a half result, and no part is done twice."""
    output = tmp_path / "out"
    arguments = [*arguments, "--include", "b*"]
    argv = [*arguments, "--output", str(output)]
    known: dict[str, tuple[int, int]] = {}
    deaths = 0
    while die_at(17 + deaths, argv):
        deaths += 1
        assert deaths < 400
        if output.exists():
            break  # it died after the rename: complete
        if not (partial_folder(output) / "moves.json").exists():
            now = finished_parts(output)
            assert {name: now[name] for name in known} == known
            known = now
    assert deaths > 50 and len(known) == 5
    write_shards.main([*arguments, "--output", str(tmp_path / "calm")])
    assert contents(output) == contents(tmp_path / "calm")
    with pytest.raises(ValueError, match="holds a finished data set"):
        write_shards.main(argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(*argv) -> subprocess.Popen:
    return subprocess.Popen(
        forked.program(TOOL, *argv), env=forked.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ten_kills_at_random_moments(tokenizer, tmp_path):
    """kill -9 of two workers' leader, each time after a few more parts and some milliseconds."""
    lines = (json.dumps({"text": python_like_text(50, seed=i)}) + "\n" for i in range(200))
    (tmp_path / "in.jsonl").write_text("".join(lines))
    argv = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer.path, "--shard-mb", 0.003, "--chunk-tokens", 500]
    output, rng, known = tmp_path / "out", random.Random(0), {}
    for _ in range(10):
        process, wanted = start(*argv, "--workers", 2, "--output", output), len(known) + rng.randint(1, 3)
        while len(list(partial_folder(output).glob("parts/?????"))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.communicate()
        assert not output.exists()
        now = finished_parts(output)
        assert {name: now[name] for name in known} == known
        known = now
    done = run(*argv, "--workers", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    assert 10 <= len(known) and f"going on: {len(known)} of " in done.stdout
    run(*argv, "--output", tmp_path / "calm")
    assert contents(output) == contents(tmp_path / "calm") and not partial_folder(output).exists()


def sleep(folder: Path, number: int) -> None:
    (folder / f"{number}.{os.getpid()}").touch()
    if number >= 2:
        time.sleep(60)


def lead(folder: Path, executor: str, env: dict) -> subprocess.Popen:
    """A process that leads two workers which sleep; it is returned when they do."""
    program = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from tests.prepare.test_parts import sleep\n"
        "from pretrain.prepare.workers import Executor; from tools.write_shards import stops_as_ctrl_c\n"
        "from pretrain.cli import run_tool\n"
        "def main():\n"
        "    with stops_as_ctrl_c():\n"
        f"        {executor}.run(partial(sleep, Path(sys.argv[1])), range(9), str, Path(sys.argv[2]))\n"
        "if __name__ == '__main__': run_tool(main)"
    )
    (folder / "work").mkdir()
    command = [sys.executable, "-c", program, str(folder / "work"), str(folder / "logs")]
    leader = subprocess.Popen(command, env=env, cwd=ROOT)
    while len(list((folder / "work").glob("[23456789].*"))) < 2:
        assert leader.poll() is None
        time.sleep(0.02)
    return leader


@pytest.mark.parametrize("signal_number, executor", [
    (signal.SIGKILL, "Executor(2)"), (signal.SIGTERM, "Executor(2)"), (signal.SIGTERM, "Executor(2, cluster='local')"),
])  # fmt: skip
def test_workers_end_with_the_process_that_leads(tmp_path, signal_number, executor):
    leader = lead(tmp_path, executor, forked.ENVIRONMENT)
    before = sorted((tmp_path / "work").iterdir())
    pids = {int(path.suffix[1:]) for path in before}
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    leader.send_signal(signal_number)
    assert leader.wait(600) == (-signal_number if signal_number == signal.SIGKILL else STOPPED)
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert sorted((tmp_path / "work").iterdir()) == before


def fail(folder: Path, number: int) -> None:
    """Numbers from 3 on fail, when 0 is done."""
    while number >= 3 and not (folder / "0").exists():
        time.sleep(0.01)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5:
        raise OSError(28, "No space left on device", "/full/disk")
    if number == 7:
        raise ZeroDivisionError("a bug")
    (folder / str(number)).touch()


@pytest.mark.parametrize("number, kind, message", [
    (3, ValueError, r"a worker was killed by signal 9 \(often: out of memory.*at part <3>: run the same command again"),
    (5, OSError, r"\[Errno 28\] No space left on device: /full/disk"),
    (7, RuntimeError, r"a worker failed:(.|\n)*fail\n(.|\n)*ZeroDivisionError: a bug"),
])  # fmt: skip
def test_a_worker_that_fails(tmp_path, number, kind, message):
    numbers = [0, 1, 2, number]
    with pytest.raises(kind, match=message):
        Executor(2).run(partial(fail, tmp_path), numbers, "part <{}>".format, tmp_path)
    assert (tmp_path / "0").exists() and not (tmp_path / str(number)).exists()


@pytest.mark.parametrize("number, message", [
    (3, r"job \d+ ended before its work was done(.|\n)*the end of .*_log.out:\n(.|\n)*Loading pickle"),
    (5, r"\[Errno 28\] No space left on device: /full/disk"),
])  # fmt: skip
def test_a_job_that_fails(tmp_path, number, message):
    executor = Executor(2, cluster="local", time_minutes=1)
    with pytest.raises((ValueError, OSError), match=message):
        executor.run(partial(fail, tmp_path), [0, 1, 2, number], str, tmp_path / "logs")
    assert (tmp_path / "0").exists()


def restart(folder: Path, number: int) -> None:
    """The first time, it waits for the time limit."""
    (folder / f"{number}.{os.getpid()}").touch()
    if len(list(folder.glob(f"{number}.*"))) == 1:
        time.sleep(60)


def test_a_job_at_its_time_limit_is_queued_again(tmp_path):
    submitit = pytest.importorskip("submitit")
    job = submitit.LocalExecutor(tmp_path / "logs").submit(_Task(partial(restart, tmp_path), [7], tmp_path / "outcome"))
    while not list(tmp_path.glob("7.*")):
        assert not job.done(), job.stdout()
        time.sleep(0.05)
    (first,) = tmp_path.glob("7.*")
    os.kill(int(first.suffix[1:]), signal.SIGUSR2)  # as the cluster does before the limit
    job.wait()
    assert len(list(tmp_path.glob("7.*"))) == 2 and (tmp_path / "outcome").read_text() == "null", job.stdout()


def test_a_bad_line_keeps_the_finished_parts(source, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = (source / "a.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:50], '{"text": \n', *lines[50:]]))
    argv = ["--input", path, "--tokenizer", tokenizer.path, "--shard-mb", 0.003, "--chunk-tokens", 500]
    failed = run(*argv, "--output", tmp_path / "out")
    assert failed.returncode == 2 and "a.jsonl, line 51: not valid JSON" in failed.stderr
    known = finished_parts(tmp_path / "out")
    assert len(known) > 3 and not (tmp_path / "out").exists()
    assert f"{len(known)} finished parts stay in {partial_folder(tmp_path / 'out')}: the same" in failed.stderr
    # The same bytes before the bad line, and another time of change: only a different file would be read again.
    path.write_text("".join(lines))
    done = run(*argv, "--output", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"{len(known)} parts were finished for other input or with other options: they are made anew" in done.stdout
    run(*argv, "--output", tmp_path / "calm")
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_other_options_redo_what_they_must(arguments, expected, tmp_path, capsys):
    """A run that died as it moved its shards; then another choice of options; then the first one again."""
    output = tmp_path / "out"
    child = os.fork()
    if not child:
        real, left = os.rename, [13 + 9]

        def rename(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        os.rename = rename
        write_shards.main([*arguments, "--output", str(output)])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((partial_folder(output) / "final").rglob("*.tar"))) == 4
    known = {path.parent.parent.name: path.stat().st_ino for path in partial_folder(output).glob("parts/*/train/*.tar")}
    assert len(known) < 13
    with pytest.raises(ValueError, match="invalid UTF-8|nothing is left of 80 documents: dropped 80"):
        write_shards.main([*arguments, "--output", str(output), "--min-chars", "1000000"])
    out = capsys.readouterr().out
    assert "13 parts were finished for other input or with other options: they are made anew" in out
    assert not partial_folder(output).exists()
    write_shards.main([*arguments, "--output", str(output)])
    assert contents(output) == expected


def test_a_full_disk_keeps_the_finished_parts(arguments, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode()}")
    try:
        failed = run(*arguments, "--output", disk / "out")
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        known = finished_parts(disk / "out")
        assert 3 < len(known) < 13 and not (disk / "out").exists()
        wanted = f"no room for {disk / 'out'} (No space left on device): about 1 MB more are needed"
        assert wanted in failed.stderr and f"{len(known)} of 13 parts are finished and stay" in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        done = run(*arguments, "--output", disk / "out")
        assert done.returncode == 0, done.stderr
        assert f"going on: {len(known)} of 13 parts were finished before" in done.stdout
        assert contents(disk / "out") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def slow_part(plan, number: int) -> None:
    time.sleep(0.7)  # so that the bar is drawn from its thread
    parts.write_part(plan, number)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_progress(arguments, expected, unbuffered, tmp_path):
    """The work goes on when the other end of a pipe is closed; a lock that is held by a dead thread would hang it."""
    program = (
        "import sys; from tests.prepare.test_parts import slow_part; from tools import write_shards as w\n"
        "w.write_part = slow_part\n"
        "if __name__ == '__main__': w.run_tool(w.main)"
    )
    argv = [*arguments, "--output", str(tmp_path / "out"), "--workers", "4"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *argv], cwd=ROOT, stderr=subprocess.PIPE, stdout=said,
            env=forked.ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    process.stderr.close()
    try:
        code = process.wait(600)
    finally:
        process.kill()
    staged = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert (tmp_path / "out").is_dir(), f"exit code {code}, {(tmp_path / 'said').read_text()}, {staged}"
    assert contents(tmp_path / "out") == expected


def test_input_that_changes_while_it_is_read(source, tokenizer, tmp_path, monkeypatch):
    real = parts.sha256_of
    monkeypatch.setattr(parts, "sha256_of", lambda piece: (os.utime(piece.path, (1, 1)), real(piece))[1])
    (tmp_path / "a.txt").write_text("some text")
    argv = ["--input", tmp_path / "a.txt", "--tokenizer", tokenizer.path, "--output", tmp_path / "out"]
    with pytest.raises(ValueError, match="a.txt was changed while it was read: run the same command again"):
        write_shards.main([str(a) for a in argv])
    assert not partial_folder(tmp_path / "out").exists()


def test_another_run_that_took_over_is_left_alone(source, tokenizer, tmp_path):
    plan = make_plan(tmp_path, "old", find_files([source]).files, tokenizer, Settings())
    (tmp_path / "run").write_text("new")
    (tmp_path / "parts").mkdir()
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    with pytest.raises(ValueError, match="another run of write_shards.py has taken over"):
        parts.write_part(plan, 0)
    assert not list((tmp_path / "parts").iterdir())
    parts.write_part(dataclasses.replace(plan, run="new"), 0)
    assert (tmp_path / "parts" / "00000" / "done.json").exists()


def words(seed: int, count: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(count))


def tally(documents: int, size: int, *examples: tuple[str, str, str]) -> dict:
    entries = [dict(zip(("source", "text", "detail"), example, strict=True)) for example in examples]
    return {"documents": documents, "bytes": size, "examples": entries}


def test_filters_from_the_command_line_to_the_report(tokenizer, tmp_path, capsys):
    evaluation = words(500, 40)
    texts = {
        "a.txt": words(1), "b.txt": "short", "c.txt": words(2, 2000), "d.txt": f"{words(3)} {evaluation} {words(4)}",
        "e.txt": f"{words(5)} someone@example.com {words(6)}", "f.txt": words(1), "g.txt": words(7), "h.txt": "",
        "i.txt": words(1),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "test.txt").write_text(evaluation)
    argv = ["--input", tmp_path / "in", "--tokenizer", tokenizer.path, "--min-chars", 10, "--max-chars", 5000,
            "--decontaminate", tmp_path / "test.txt", "--scrub-pii", "--dedup", "exact"]  # fmt: skip
    small = ["--shard-mb", 0.0001]
    for name, more in {"one": [], "two": small, "workers": [*small, "--workers", 2]}.items():
        write_shards.main([str(a) for a in [*argv, *more, "--output", tmp_path / name]])
    assert contents(tmp_path / "two") == contents(tmp_path / "workers")
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report == json.loads((tmp_path / "one" / "report.json").read_text())

    def source(name: str) -> str:
        return str(tmp_path / "in" / name)

    def short(text: str) -> str:
        return text[:200] + "..."

    too_long = f"{len(texts['c.txt']):,} characters, at most 5,000 wanted"
    alike, long, dirty = f"like {source('a.txt')}", texts["c.txt"], texts["d.txt"]
    assert report["dropped"] == {
        "too_short": tally(1, 5, (source("b.txt"), "short", "5 characters, at least 10 wanted")),
        "too_long": tally(1, len(long), (source("c.txt"), short(long), too_long)),
        "contaminated": tally(1, len(dirty), (source("d.txt"), short(dirty), " ".join(evaluation.split()[:13]))),
        "exact_duplicate": tally(
            2, 2 * len(words(1)),
            (source("f.txt"), short(words(1)), alike), (source("i.txt"), short(words(1)), alike),
        ),
        "near_duplicate": tally(0, 0),
    }  # fmt: skip
    assert {kind: entry["finds"] for kind, entry in report["scrubbed"].items() if entry["finds"]} == {"email": 1}
    inputs = json.loads((tmp_path / "one" / "inputs.json").read_text())
    assert {Path(piece["file"]).name: (piece["documents"], piece["dropped"]) for piece in inputs["inputs"]} == {
        "a.txt": (1, {}), "b.txt": (0, {"too_short": 1}), "c.txt": (0, {"too_long": 1}),
        "d.txt": (0, {"contaminated": 1}), "e.txt": (1, {}), "f.txt": (0, {"exact_duplicate": 1}), "g.txt": (1, {}),
        "h.txt": (0, {"empty": 1}), "i.txt": (0, {"exact_duplicate": 1}),
    }  # fmt: skip
    kept = [texts["a.txt"], texts["e.txt"].replace("someone@example.com", "<EMAIL>"), texts["g.txt"]]
    assert inputs["written"]["."]["bytes"] == sum(map(len, kept))
    assert inputs["read"] == {"documents": 8, "empty": 1, "invalid": 0}
    for piece in inputs["inputs"]:
        assert piece["sha256"] == hashlib.sha256(Path(piece["file"]).read_bytes()).hexdigest()
    manifest = manifests.load(tmp_path / "one")
    tokens = [token for text in kept for token in [*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix]]
    chunk = manifest.chunks(0)[0]
    data = (tmp_path / "one" / "00000000.tar").read_bytes()
    assert np.frombuffer(data, "<u2", int(chunk["tokens"]), int(chunk["tokens_offset"])).tolist() == tokens
    assert "dropped 2 documents (0.0 MB) the same as an earlier one" in capsys.readouterr().out


def test_near_duplicates_are_the_same_for_any_number_of_workers(tokenizer, tmp_path):
    """Over parts: 30 texts, and for each third one a copy with one word changed, far behind it."""
    texts = [words(seed, 300) for seed in range(30)]
    copies = [text.replace(text.split()[150], "changed") for text in texts[::3]]
    lines = [json.dumps({"text": text}) + "\n" for text in texts + copies]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    argv = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer.path, "--dedup", "near", "--threads", 1]
    write_shards.main([str(a) for a in [*argv, "--shard-mb", 0.003, "--output", tmp_path / "one"]])
    done = run(*argv, "--shard-mb", 0.003, "--output", tmp_path / "two", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(json.loads((tmp_path / "one" / "inputs.json").read_text())["inputs"]) > 8
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["dropped"]["near_duplicate"]["documents"] == 10
    assert manifests.load(tmp_path / "one").docs == 30


def test_deduplication_goes_on_after_a_kill(tokenizer, tmp_path):
    lines = [json.dumps({"text": words(seed % 20, 200)}) + "\n" for seed in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    argv = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer.path, "--dedup", "exact", "--shard-mb", 0.004]
    argv = [str(a) for a in [*argv, "--threads", 1]]
    deaths = 0
    while die_at(20 + deaths, [*argv, "--output", str(tmp_path / "out")]):
        deaths += 1
        assert deaths < 200
        signed = partial_folder(tmp_path / "out") / "signed"
        if deaths > 20 and (signed / "decided").exists() and (signed / "00001").exists():
            shutil.rmtree(signed / "00001")  # as a run with other options would that died before its own decision
    assert deaths > 30
    write_shards.main([*argv, "--output", str(tmp_path / "calm")])
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert manifests.load(tmp_path / "out").docs == 20


def test_refused_options(source, tokenizer, tmp_path):
    def refused(*argv) -> str:
        with pytest.raises(SystemExit):
            write_shards.main([str(a) for a in ["--input", source, "--tokenizer", "t", "--output", "o", *argv]])

    for argv in (["--workers", 0], ["--dedup-threshold", 0], ["--partition", "p"], ["--cluster-option", "mem"],
                 ["--cluster", "slurm", "--cluster-option", "not an option=3"]):  # fmt: skip
        refused(*argv)
    assert write_shards.option("mem=8GB") == ("mem", "8GB") and write_shards.option("nodes=2") == ("nodes", 2)


@pytest.mark.slurm
def test_slurm_writes_the_same_bytes(arguments, expected, cluster, tmp_path):
    """An array of two jobs on a real Slurm; then one whose job is killed, and what the next run makes of it."""
    options = ["--cluster", "slurm", "--workers", "2", "--partition", "main", "--time-minutes", "5"]
    command = [sys.executable, str(TOOL), *arguments, *options]
    options = {"env": cluster.env | {"PYTHONPATH": str(ROOT)}, "timeout": 100, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 jobs of slurm" in done.stdout
    assert contents(tmp_path / "out") == expected

    refused = [*command, "--output", str(tmp_path / "no"), "--cluster-option", "qos=5", "--partition", "nowhere"]
    done = subprocess.run(refused, **options)
    assert done.returncode == 2 and "Slurm does not take the job" in done.stderr, done.stderr
    unknown = [*command, "--output", str(tmp_path / "no"), "--cluster-option", "colour=red"]
    done = subprocess.run(unknown, **options)
    assert done.returncode == 2 and "does not take the options" in done.stderr and "account" in done.stderr


@pytest.mark.slurm
def test_a_slurm_job_that_is_killed_is_named(cluster, tmp_path, monkeypatch):
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(workers, "QUEUE_SECONDS", 1.0)
    monkeypatch.setattr(workers, "LOST_SECONDS", 2.0)
    executor = Executor(2, cluster="slurm", time_minutes=5)
    with pytest.raises(ValueError, match=r"job \d+_1 ended before its work was done"):
        executor.run(partial(fail, tmp_path), [0, 1, 2, 3], str, tmp_path / "logs")
    with pytest.raises(OSError, match="No space left on device: /full/disk"):
        executor.run(partial(fail, tmp_path), [0, 5], str, tmp_path / "logs")


@pytest.mark.slurm
def test_ctrl_c_cancels_the_jobs(cluster, tmp_path):
    leader = lead(tmp_path, "Executor(2, cluster='slurm')", cluster.env | {"PYTHONPATH": str(ROOT)})
    assert len(cluster.run("squeue", "--noheader", "--array").splitlines()) == 2
    leader.send_signal(signal.SIGINT)
    assert leader.wait(600) == STOPPED
    deadline = time.monotonic() + 600
    while cluster.run("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
