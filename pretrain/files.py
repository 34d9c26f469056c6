"""Files that are there complete or not at all, whatever crashes; and readers of those that are still being written."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.cli import Held

TASK, RESULT, PREDICTIONS = "task.json", "result.json", "predictions.jsonl"  # in the folder of a fine-tuned run
EVALUATION, IMPORTED = "evaluation.json", "imported.json"  # in a run's folder: of tools/evaluate.py, tools/import_hf.py
DATA, TRAINED_ON = "data.json", "val_trained_on"  # what identifies a run's data; in it: what of data.val is trained on
_TAKEN: dict[Path, Any] = {}  # the locked files of this process
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an OSError says when a disk is full


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there complete or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def why_not_in(folder: Path) -> str | None:
    """Why nothing can be written in a folder that is there, or is to be made; None where it can."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


def check_new_folder(output: Path) -> None:
    """Refuse a folder that could not get its name at the end, before the work on it begins."""
    if output.is_mount():
        raise ValueError(f"{output} is a mount point, and cannot be replaced: name a folder inside it")
    if why := why_not_in(output.absolute().parent):
        raise ValueError(f"{output}: {why}: name another place")


def check_output(path: Path | None) -> None:
    """Refuse a file that could not be written at the end, before the work on it begins."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    why = None if path.exists() and os.access(path, os.W_OK) else why_not_in(path.absolute().parent)
    if why:
        raise ValueError(f"--output {path}: {why}: name another place")


def write_output(path: Path, data: bytes) -> None:
    """Write what a user asked for where they said: into a FIFO or a device, through a link, else atomically."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            file.write(data)
    else:
        write_atomically(path, data)


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; a line that is being written, or damaged, is passed over."""
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (new files, renames) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))  # hashlib.file_digest needs Python 3.11
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def lock(handle: int, busy: str) -> bool:
    """Lock an open file or folder for this process until it is closed; `Held` (`busy`) when another has it. False where
    the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise Held(busy) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return False


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same file: what is read there can be written back."""
    with open(path.with_name(f".{path.name}.lock"), "a", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take(path: Path, about: str = "") -> str | None:
    """Lock a file, made where there is none, for this process as long as it lives; None, or who else holds it.

    What is in it says who: `process N on HOST`, and what else there is to say `about` it. NFS has such locks; where a
    file system has none, that is said.
    """
    if path.absolute() in _TAKEN:
        return None
    file = open(path, "a+", encoding="utf-8")  # open as long as the process lives
    try:
        if not lock(file.fileno(), "busy"):
            print(f"note: {path.parent} is on a disk without locks: nothing keeps a second process from writing there",
                  file=sys.stderr, flush=True)  # fmt: skip
    except Held:
        file.seek(0)
        return file.read().strip() or "another process"
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{about}\n")
    file.flush()
    _TAKEN[path.absolute()] = file
    return None


def holder(path: Path) -> str | None:
    """Who holds the lock of a file (`take`): None where nobody does."""
    if path.absolute() in _TAKEN or not path.exists():
        return None
    with open(path, "r+", encoding="utf-8") as file:
        try:
            lock(file.fileno(), "busy")
        except Held:
            return file.read().strip() or "another process"
    return None


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise `OSError` when the disk has less room than `what` of `size` bytes needs."""
    free = shutil.disk_usage(folder).free
    if free < size * 1.02 + 2**20:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB free, {what} needs {size / 1e9:.2f} GB")


def private_folder(folder: Path) -> Path:
    """A folder that nobody else may read or write in, made where there is none. `ValueError` for somebody else's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ValueError(f"{folder} is not a folder of this user's own")
    folder.chmod(0o700)
    return folder
