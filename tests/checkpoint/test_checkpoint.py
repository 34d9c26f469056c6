"""Checkpoints under damage, failing ranks, full disks and kills: what is visible is complete and loads."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from pretrain.checkpoint.manifest import read_manifest

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


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_save(tmp_path, environment):
    (tmp_path / "step-000000000").write_text("not a folder")
    ran = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith("saved"), ran.stdout + ran.stderr
    assert read_manifest(tmp_path / "step-000000001")["step"] == 1


def test_a_manifest_of_another_format_is_refused(tmp_path):
    body = {"format": 99}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": digest}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        read_manifest(tmp_path)
