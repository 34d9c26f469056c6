"""The files of the local cache of remote data: what is there is whole, and the shards fit into a set number of bytes.

The processes of a machine share one folder, CACHE/LOCATION/FILE. They agree by file locks only, which the kernel lets
go when a process dies:

    LOCATION/.NAME.lock     held while NAME is looked up or fetched, so that it is fetched once
    .lock                   held while room is made and while a file gets its final name
    the files themselves    a download holds its temporary file locked, a reader its shard: what nobody holds may go

A temporary name (NAME.BYTES.UNIQUE.part) says how many bytes the download will take: room is counted before it is used.
"""

import contextlib
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PART, SHARD = ".part", ".tar"
OURS = "[0-9a-f]" * 16  # how our folders, and the names of shards in them, begin: what else lies here is let alone
POLL_SECONDS = 0.1
_told: set[Path] = set()  # the caches whose limit we have warned of


class Full(Exception):
    """There is no room now, and the caller does not want to wait for it."""


@dataclass(frozen=True)
class Part:
    """A file on its way into the cache, locked by `handle` until it has its final name or is dropped."""

    path: Path
    handle: int

    def commit(self, final: Path, cache: Path) -> int:
        """Give it its final name; the handle to read it, which marks it as in use."""
        # under the lock: one who counts must see it under the old name or the new one
        with lock_file(cache / ".lock"):
            os.replace(self.path, final)
        _flock(self.handle, fcntl.LOCK_SH, final)
        return self.handle

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.handle)


def make_folder(folder: Path) -> None:
    """The folder of one location; `ValueError` when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the cache folder {folder} ({error.strerror}): set data.cache") from None


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock among the threads of all processes."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _flock(handle, fcntl.LOCK_EX, path)
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has a copy of the handle
        os.close(handle)


def open_shard(path: Path, size: int) -> int | None:
    """A shard of the cache as an open handle, marked as in use and as used last; None when it is not there whole."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(handle).st_size != size:
        os.close(handle)
        path.unlink(missing_ok=True)
        return None
    _flock(handle, fcntl.LOCK_SH, path)
    with contextlib.suppress(FileNotFoundError):  # dropped just now: the handle still reads it
        os.utime(path)
    return handle


def new_part(cache: Path, final: Path) -> Part:
    """A temporary file for a small file, which takes no room of the shards."""
    with lock_file(cache / ".lock"):
        return _create(final, 0)


def _create(final: Path, size: int) -> Part:
    # under the lock: one who looks for leftovers must not meet it before it is locked
    path = final.with_name(f"{final.name}.{size}.{uuid.uuid4().hex}{PART}")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _flock(handle, fcntl.LOCK_EX, path)
    return Part(path, handle)


def reserve(cache: Path, max_bytes: int, final: Path, size: int, patient: bool) -> Part:
    """A temporary file for a shard, once there is room for it; the shards unused for longest are dropped.

    Not `patient`: shards that somebody reads are not dropped, other downloads are not waited for; `Full` instead.
    """
    if size > max_bytes:
        raise ValueError(
            f"{final.name[17:]} has {size / 1e9:.3g} GB, more than the cache may hold ({max_bytes / 1e9:.3g} GB): "
            "set data.cache_gb to several times the size of a shard"
        )
    while True:
        with lock_file(cache / ".lock"):
            if _make_room(cache, max_bytes - size, patient):
                return _create(final, size)
        if not patient:
            raise Full
        time.sleep(POLL_SECONDS)  # the downloads under way take the room: each ends in time, or is given up


def _make_room(cache: Path, max_bytes: int, also_used: bool) -> bool:
    """Drop shards until all shards and downloads take at most `max_bytes`; False when the downloads alone take more."""
    total, shards = 0, []
    for path in cache.glob(f"{OURS}/*"):
        if path.suffix == PART and not _drop_unlocked(path):
            total += int(path.name.split(".")[-3])
        elif path.match(f"{OURS}-*{SHARD}"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                shards.append((facts.st_mtime_ns, facts.st_size, path))
    total += sum(size for _, size, _ in shards)
    used = []
    for shard in sorted(shards):
        if total > max_bytes and _drop_unlocked(shard[2]):
            total -= shard[1]
        else:
            used.append(shard)
    if also_used and total > max_bytes and used:
        _tell_too_small(cache, sum(size for _, size, _ in shards))
        for _, size, path in used:
            if total > max_bytes:
                path.unlink(missing_ok=True)
                total -= size
    return total <= max_bytes


def _drop_unlocked(path: Path) -> bool:
    """Delete a file unless somebody holds it; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _tell_too_small(cache: Path, used_bytes: int) -> None:
    if cache not in _told:
        _told.add(cache)
        print(
            f"the cache {cache} is smaller than the shards in use at once (more than {used_bytes / 1e9:.3g} GB): they "
            "take room on the disk beyond its limit, and are fetched again and again; set data.cache_gb higher",
            file=sys.stderr,
        )


def _flock(handle: int, operation: int, path: Path) -> None:
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ValueError(f"cannot lock {path} ({error.strerror}): set data.cache to a folder on a local disk") from None
