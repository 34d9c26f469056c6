"""Where a data set lies: a local folder, or a remote one read through a bounded local cache.

A remote file is downloaded under a temporary name (fetch.py), checked (size, sha256), and only then renamed: what has
its final name in the cache (cache.py) was right. Addresses hold no credentials, those come from the environment.
"""

import contextlib
import functools
import hashlib
import os
import queue
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from pretrain.files import NO_ROOM, sha256_of_file
from pretrain.shards import cache as files
from pretrain.shards import fetch

SCHEMES = ("file", "http", "https", "s3", "gs")
NOTICE_SECONDS = 1.0  # a wait longer than this is told, once
PREFETCH_THREADS = 2


@dataclass(frozen=True)
class CacheSettings:
    """Where copies of remote files are kept, and how many bytes of shards at most (the small files come on top)."""

    folder: Path
    max_bytes: int


class Store:
    """A local folder of files. `location` is what the user gave, for messages."""

    is_remote = False

    def __init__(self, location: str):
        self.location = location

    def exists(self, name: str) -> bool:
        """Whether the store has a file of this name."""
        return (Path(self.location) / name).is_file()

    def path(self, name: str, sha256: str | None = None) -> Path:
        """A small file (index, sidecar, tokenizer) as a local file; fetched when remote. Not there: `ValueError`."""
        path = Path(self.location) / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it again, or write the shards again")
        return path

    def open(self, name: str, size: int, sha256: str) -> BinaryIO:
        """A shard, opened unbuffered for positioned reads; when remote, its verified copy in the cache."""
        return open(Path(self.location) / name, "rb", buffering=0)

    def discard(self, name: str) -> bool:
        """Drop the cached copy, so that the next `open` fetches the file again; False where there is no cache."""
        return False

    def prefetch(self, name: str, size: int, sha256: str) -> None:
        """Fetch a shard in the background, soon to be opened; nothing to do where it is local."""


class RemoteStore(Store):
    """A remote folder behind a local cache. Safe to share between threads and across a fork."""

    is_remote = True

    def __init__(self, location: str, cache: CacheSettings):
        super().__init__(location)
        self._base = location.rstrip("/")
        self._cache, self._max_bytes = Path(cache.folder), cache.max_bytes
        self._folder = self._cache / hashlib.sha256(self._base.encode()).hexdigest()[:16]

    def exists(self, name: str) -> bool:
        """Whether the server has the file; False only when it says so (404)."""
        with _notice(f"waiting for {self._url(name)}"):
            return fetch.exists(self._url(name))

    def path(self, name: str, sha256: str | None = None) -> Path:
        """A small file in the cache: the copy there when it has this sha256, else (and without one) fetched anew."""
        final = self._folder / name
        if not _is_cached(final, sha256):
            with _notice(f"fetching {self._url(name)}"), self._locked(name):
                if not _is_cached(final, sha256):
                    os.close(self._download(name, final, files.new_part(self._cache, final), None, sha256))
        return final

    def open(self, name: str, size: int, sha256: str) -> BinaryIO:
        """The shard in the cache, fetched if need be; the open file stays good when the cache drops the shard."""
        handle = files.open_shard(self._shard_path(name, sha256), size)
        if handle is None:
            with _notice(f"fetching {self._url(name)} ({_readable(size)})"):
                handle = self.obtain(name, size, sha256)
        return open(handle, "rb", buffering=0)

    def discard(self, name: str) -> bool:
        with self._locked(name):
            for copy in self._folder.glob(f"{'?' * 16}-{name}"):
                copy.unlink(missing_ok=True)
        return True

    def prefetch(self, name: str, size: int, sha256: str) -> None:
        """Fetch a shard in the background, unless it is cached or on its way. Errors are left to `open`."""
        if not self._shard_path(name, sha256).exists():
            _prefetcher(os.getpid()).submit(self, name, size, sha256)

    def obtain(self, name: str, size: int, sha256: str, patient: bool = True) -> int:
        """A handle of the shard in the cache, which this or another process fetches. `patient`: see cache.reserve."""
        final = self._shard_path(name, sha256)
        with self._locked(name):
            handle = files.open_shard(final, size)
            if handle is None:
                part = files.reserve(self._cache, self._max_bytes, final, size, patient)
                handle = self._download(name, final, part, size, sha256)
            return handle

    def _url(self, name: str) -> str:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) and ".." not in name
        return f"{self._base}/{name}"

    def _shard_path(self, name: str, sha256: str) -> Path:
        # named by content too: a data set written anew at the same address is not mixed up with the old one
        assert name.endswith(files.SHARD)
        return self._folder / f"{sha256[:16]}-{name}"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        files.make_folder(self._folder)
        with files.lock_file(self._folder / f".{name}.lock"):
            yield

    def _download(self, name: str, final: Path, part: files.Part, size: int | None, sha256: str | None) -> int:
        """Fetch a file into `part`, check it and give it its name; a handle of it. `size` None: a small file."""
        try:
            fetch.fetch(self._url(name), part.path, size, sha256)
            return part.commit(final, self._cache)
        except BaseException as error:
            part.drop()
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                needed = f"it needs {size:,} bytes" if size is not None else "it is a small file"
                raise ValueError(
                    f"no room for {self._url(name)} in {self._cache} ({error.strerror}; {needed}): make room there, "
                    "set data.cache to a folder on another disk, or data.cache_gb lower"
                ) from None
            raise


def open_store(location: str | Path, cache: CacheSettings | None = None) -> Store:
    """The store at a local path or a URL; `ValueError` for every address that is not plainly one of `SCHEMES`."""
    location = str(location)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", location)
    if match is None and "::" not in location:
        return Store(location)
    scheme = match[1].lower() if match else ""
    rest = _checked_address(scheme, location)
    if scheme == "file":
        return Store(unquote(rest.removeprefix("localhost")))
    if cache is None:
        raise ValueError(f"{location} is remote: set data.cache to a local folder for the copies of its shards")
    return RemoteStore(f"{scheme}://{rest}", cache)


def _checked_address(scheme: str, location: str) -> str:
    """What follows SCHEME:// in an address of the plain kind. No message repeats more than is surely no password."""
    if "::" in location or scheme not in SCHEMES or not location[len(scheme) :].startswith("://"):
        raise ValueError(
            f"the address {scheme}:... is refused: give a local path (./NAME where it holds a colon) or a URL that "
            f"begins with one of {', '.join(f'{s}://' for s in SCHEMES)} and is without '::'"
        )
    rest = location[len(scheme) + 3 :]
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    if scheme == "file" and host not in ("", "localhost"):
        raise ValueError("the address file://... is refused: write file:///FOLDER, with three slashes")
    if scheme != "file" and not re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", host):
        raise ValueError(
            f"the address {scheme}://... is refused: its first part is not a plain host or bucket. Credentials do not "
            "belong into an address, which is kept with the run; they come from the environment: AWS_* for s3, "
            "GOOGLE_APPLICATION_CREDENTIALS for gs, ~/.netrc for http"
        )
    if re.search(r"[?#\\\x00-\x1f\x7f]", rest):
        raise ValueError(
            f"the address {scheme}://... is refused: a folder's address has no query (?), fragment (#), backslash or "
            "control character"
        )
    return rest


def _is_cached(path: Path, sha256: str | None) -> bool:
    return sha256 is not None and path.is_file() and sha256_of_file(path) == sha256


class _Prefetcher:
    """Threads that fetch shards. They are daemons of our own: an executor's would be waited for at the exit."""

    def __init__(self):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._pending: set[tuple] = set()
        self._lock = threading.Lock()
        for _ in range(PREFETCH_THREADS):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def submit(self, store: RemoteStore, *shard: Any) -> None:
        job = (store.location, *shard)
        with self._lock:
            if job in self._pending:
                return
            self._pending.add(job)
        self._queue.put((store, job))

    def _work(self) -> None:
        while True:
            store, job = self._queue.get()
            with contextlib.suppress(Exception):  # who opens the shard meets it again, and tells it
                os.close(store.obtain(*job[1:], patient=False))
            with self._lock:
                self._pending.discard(job)


@functools.lru_cache
def _prefetcher(process: int) -> _Prefetcher:
    return _Prefetcher()  # of this process: threads do not come along in a fork


@contextlib.contextmanager
def _notice(text: str) -> Iterator[None]:
    """Say what we wait for, when it takes long."""
    timer = threading.Timer(NOTICE_SECONDS, fetch.say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _readable(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size:,} bytes"
