"""Files that are there complete or not at all, in places that can take them, locked by one process."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from pretrain import files
from pretrain.hub.convert import staged
from pretrain.prepare.staging import staging_folder
from tests import forked
from tests.forked import ROOT


def test_what_is_no_plain_file_is_written_through(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    files.write_output(tmp_path / "pipe", b"through")
    reader.join()
    assert read == [b"through"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    files.write_output(tmp_path / "new", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    files.write_output(tmp_path / "link", b"second")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").read_bytes() == b"second"
    assert sorted(os.listdir(tmp_path)) == ["link", "new", "pipe"]


def test_a_place_that_cannot_take_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "none" / "x", "there is no folder"),
        (tmp_path / "file" / "x", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            files.check_output(output)
    files.check_output(tmp_path / "file")
    files.check_output(None)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_mount_point_and_a_folder_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], check=True)
    try:
        with pytest.raises(ValueError, match="disk is a mount point, and cannot be replaced: name a folder inside it"):
            files.check_new_folder(tmp_path / "disk")
        files.check_new_folder(tmp_path / "disk" / "inside" / "out")
        with pytest.raises(ValueError, match="disk is a mount point"), staging_folder(tmp_path / "disk", "run"):
            pass
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(ValueError, match="disk cannot be written"), staged(tmp_path / "disk" / "out"):
            pass
        for output in ("out", "inside/out"):
            with pytest.raises(ValueError, match=f"{output}: .*disk cannot be written: name another place"):
                files.check_new_folder(tmp_path / "disk" / output)
        with pytest.raises(ValueError, match="disk cannot be written"):
            files.check_output(tmp_path / "disk" / "x")
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_tool_says_so_before_it_works(tmp_path):
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "there").mkdir()
    options = ("--input", tmp_path / "text.txt", "--vocab-size", 300, "--output", f"{tmp_path}/there/")
    line = forked.program(ROOT / "tools" / "train_tokenizer.py", *options)
    done = subprocess.run(line, env=forked.ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "there is a folder: name a file in it" in done.stderr and not done.stdout


def test_a_lock_is_one_processes_and_goes_with_it(tmp_path):
    program = "import sys; from pathlib import Path; from pretrain import files; print(files.take(Path(sys.argv[1])))"
    wait = f"{program}; sys.stdout.flush(); sys.stdin.read()"
    lock = tmp_path / "lock"
    first = subprocess.Popen(
        [sys.executable, "-c", wait, str(lock)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "None\n" and f"process {first.pid} on " in lock.read_text()
    assert files.holder(lock) == files.take(lock) == lock.read_text().strip()
    first.kill()
    first.wait()
    assert files.holder(lock) is None and files.take(lock) is None and files.take(lock) is None
    assert f"process {os.getpid()} on " in lock.read_text() and files.holder(lock) is None
    assert files.holder(tmp_path / "none") is None


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert files.take(tmp_path / "lock") is None
    assert f"note: {tmp_path} is on a disk without locks" in capsys.readouterr().err


def test_a_private_folder_is_this_users_alone(tmp_path):
    folder = tmp_path / "a/b"
    assert files.private_folder(folder) == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(files.private_folder(folder).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="link is not a folder of this user's own"):
        files.private_folder(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(folder, 1234, -1)
        with pytest.raises(ValueError, match="is not a folder of this user's own"):
            files.private_folder(folder)
