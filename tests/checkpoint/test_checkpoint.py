"""Checkpoints under damage, failing ranks, full disks and kills: what is visible is complete and loads."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import MANIFEST, read_manifest

SAVE = (
    "import sys; from pathlib import Path; from pretrain import dist;"
    "from pretrain.checkpoint.save import Checkpoints;"
    "from tests.dist.checkpoint_worker import fragments, header; dist.start(dist.ALONE);"
    "saver = Checkpoints(Path(sys.argv[1]), dist.ALONE, 1, lambda kind, **facts: print(kind, facts));"
    "saver.save(header(1), fragments(1, [0, 1], 0)); saver.wait(); dist.finish(0)"
)


@pytest.fixture(scope="module")
def results(worker):
    return worker("checkpoint_worker.py")


def test_leftovers_of_a_killed_save_are_removed_and_the_newest_kept(results):
    assert results["leftovers"] == []
    assert results["kept"] == ["step-000000004", "step-000000003", "step-000000002"]


def test_any_cut_into_fragments_loads(results):
    assert results["resharded"]


def test_an_error_on_one_rank_ends_the_save_on_all_and_harms_nothing(results):
    found = results["failed_rank"]
    assert found["committed"] == [False, False]
    assert found["after"] == ["step-000000002", "step-000000003", "step-000000004"]
    for said in found["said"]:
        assert said[0][1]["step"] == 5 and "File too large" in said[0][1]["error"]
    assert found["again"] == [True, True]


def test_a_resume_reads_the_manifest_once_and_each_section_on_one_rank(results):
    opened, kept = results["opened"]
    assert [each.count("manifest.json") for each in opened] == [1, 1]
    assert sorted(name for each in opened for name in each if name != "manifest.json") == 2 * ["part-00000.safetensors"]
    assert kept == [[], []], "the disk would keep what is mapped"


def test_a_save_takes_the_memory_of_one_copy_which_the_next_one_uses_again(results):
    found = results["memory"]
    assert all(first == second for first, second in found["buffer"])
    for size, (first, second), (left, more) in zip(found["bytes"], found["taken"], found["left"], strict=True):
        assert 0.9 * size < first < 1.1 * size and left > 0.9 * size
        assert second < 0.1 * size and more < 0.1 * size


def test_ranks_of_a_node_fill_files_together_and_those_of_two_never_do(results):
    found = results["files"]
    assert {case: len(each["tensors"]) for case, each in found.items()} == {
        "together": 1, "apart": 2, "nodes": 2, "one": 1}  # fmt: skip
    for case, each in found.items():
        assert each["committed"] and each["right"] == [True, True], case
        assert min(each["sections"]) > 2, "each is of 64 bytes"
        held = sum(each["tensors"].values(), [])
        assert {"frozen.0:weight:0", "frozen.1:weight:0", "__padding__:0"} <= set(held), case
        assert len(held) == len(set(held))
    assert "a.weight:weight,exp_avg:0" in found["nodes"]["tensors"]["part-00000.safetensors"]
    assert "a.weight:weight,exp_avg:12" in found["nodes"]["tensors"]["part-00001.safetensors"]


def test_a_second_attempt_begins_with_new_files(results):
    found = results["once"]
    assert found["committed"] == found["right"] == [True, True] and found["events"] == ["saved"]
    for opened in found["opened"]:
        assert len(opened) == len(set(opened)) == 2
    assert found["left"] == ["step-000000001"]


def test_what_another_process_does_not_read_as_it_was_meant_is_not_committed(results):
    found = results["changed"]
    for ((kind, facts),) in found["events"]:
        assert kind == "save_failed" and "part-00000.safetensors, bytes" in facts["error"], facts
    assert found["left"] == []


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(results, kind):
    found = results["damage"][kind]
    assert found["chosen"] == "step-000000004" and found["right"] == [True, True]
    (event,) = found["events"]
    assert event[0] == "checkpoint_rejected" and event[1]["checkpoint"] == "step-000000005"
    words = {"truncated": "bytes instead of", "flipped": "sha256", "missing": "missing", "manifest": "changed",
             "no manifest": "cannot be read"}  # fmt: skip
    assert words[kind] in event[1]["reason"]
    assert any(name.startswith("bad-step-000000005") for name in found["names"]), "nothing is thrown away"


def test_killed_at_any_file_operation_a_complete_checkpoint_remains(worker):
    found = worker("kill_worker.py", ranks=1)
    assert found["statuses"][-1] == 0 and set(found["statuses"][:-1]) == {signal.SIGKILL}
    assert len(found["statuses"]) >= 8, "the save has at least this many file operations"
    assert set(found["survivors"]) == {1, 2} and found["survivors"] == sorted(found["survivors"])


def test_a_disk_too_small_is_said_before_writing(tmp_path, environment):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        ran = subprocess.run([sys.executable, "-c", SAVE, str(small)], env=environment, capture_output=True, text=True)
        assert "save_failed" in ran.stdout and "GB free, the checkpoint needs" in ran.stdout
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.fixture(scope="module")
def traced(tmp_path_factory, environment) -> tuple[Path, list[str]]:
    """A save beside an old checkpoint that cannot be removed: its folder, and the system calls on it in their order."""
    folder, trace = tmp_path_factory.mktemp("traced"), tmp_path_factory.mktemp("trace") / "trace"
    (folder / "step-000000000").write_text("not a folder")
    strace = ["strace", "-f", "-y", "-o", trace, "-e", "trace=write,pwrite64,fsync,rename"]
    line = [*(strace if shutil.which("strace") else []), sys.executable, "-c", SAVE, folder]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith("saved"), ran.stdout + ran.stderr
    calls = trace.read_text().splitlines() if trace.exists() else []
    return folder, [call for call in calls if str(folder) in call and "resumed>" not in call]


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_save(traced):
    assert read_manifest(traced[0] / "step-000000001")["step"] == 1


def test_a_checkpoint_is_on_the_disk_before_it_is_visible(traced):
    folder, calls = traced
    if not calls:
        pytest.skip("needs strace")

    def last(call: str, path: str) -> int:
        return max(number for number, said in enumerate(calls) if f"{call}(" in said and f"{path}>" in said)

    part, manifest = (f"{folder}/.staging-step-000000001-1/{name}" for name in ("part-00000.safetensors", MANIFEST))
    shown = next(number for number, said in enumerate(calls) if "rename(" in said)
    assert last("pwrite64", part) < last("fsync", part) < last("write", manifest) < last("fsync", manifest)
    assert last("fsync", manifest) < last("fsync", f"{folder}/.staging-step-000000001-1") < shown
    assert shown < last("fsync", folder)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    body = '"format":99}\n'
    digest = hashlib.sha256(body.encode()).hexdigest()
    (tmp_path / MANIFEST).write_text(f'{{"manifest_sha256":"{digest}",\n{body}')
    with pytest.raises(ValueError, match="format 99, this version reads 1 and 2"):
        read_manifest(tmp_path)
