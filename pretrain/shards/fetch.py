"""One remote file to one local file, checked; what can pass is tried again.

fsspec does the reading, with its own backends: aiohttp (http, https), s3fs and gcsfs, which are extras of this package.
They take credentials from the environment.
"""

import functools
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.cli import how_to_install
from pretrain.files import NO_ROOM, sha256_of_file

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs"}  # scheme -> what to install: pretrain[...]
ATTEMPTS = 5
BACKOFF_SECONDS = (0.5, 8.0)  # before the second attempt, and at most; doubled each time
STALL_SECONDS = 30.0  # without a byte, and the attempt has failed
SMALL_FILE_BYTES = 1 << 30  # an index of millions of shards is smaller; a body without an end is not
RANGE_BYTES = 8 << 20  # s3 is read in ranges of this size, four at a time
_JITTER = random.Random()  # our own, so that nobody's seeded numbers change


class NotThere(ValueError):
    """The server says that there is no such file."""


class _WrongBody(Exception):
    """What came is not what was written: worth another attempt."""


def exists(url: str) -> bool:
    """Whether the server has the file; False only when it says so (404)."""
    system = _file_system(url)
    try:
        _with_retries(url, lambda: system.cat_file(url, start=0, end=1))
    except NotThere:
        return False
    return True


def fetch(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    """Write a remote file over the local `path`; what is known of it (size in bytes, sha256) holds, or `ValueError`.

    A fault of our own disk is the `OSError` that it is.
    """
    system, limit = _file_system(url), SMALL_FILE_BYTES if size is None else size

    def attempt() -> None:
        system.get_file(url, str(path), callback=_limit(path, limit))
        _check_body(path, size, sha256)

    _with_retries(url, attempt)


def say(text: str) -> None:
    """One line for the user."""
    print(text, file=sys.stderr, flush=True)


def _with_retries(url: str, attempt: Callable[[], Any]) -> None:
    """Try until it works; `ValueError` when that is hopeless or was in vain `ATTEMPTS` times."""
    for number in range(1, ATTEMPTS + 1):
        try:
            attempt()
            return
        except Exception as error:
            reason, hopeless = _judge(error, url)
            if hopeless is not None:
                raise hopeless from None
            if number == ATTEMPTS:
                raise ValueError(f"fetching {url} failed {ATTEMPTS} times, the last time: {reason}; "
                                 "check the server and the network, then start again") from None  # fmt: skip
        wait = min(BACKOFF_SECONDS[0] * 2 ** (number - 1), BACKOFF_SECONDS[1]) * _JITTER.uniform(0.75, 1)
        say(f"fetching {url} failed ({reason}), attempt {number + 1} of {ATTEMPTS} in {wait:.1f} s")
        time.sleep(wait)


def _judge(error: Exception, url: str) -> tuple[str, Exception | None]:
    """Why an attempt failed, and what to raise at once when another one would not help."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    status = int(status) if str(status).isdigit() else 0
    if isinstance(error, OSError) and (error.errno in NO_ROOM or error.filename is not None):
        return "our own disk", error
    if isinstance(error, FileNotFoundError) or status == 404:
        return "404", NotThere(f"{url} is not there (404): check the address, or copy the file there again")
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden: "):
        what = f"HTTP {status}" if status else error
        return "403", ValueError(
            f"{url}: access is denied ({_plain(what)}). Credentials come from the environment: AWS_* for s3, "
            "GOOGLE_APPLICATION_CREDENTIALS for gs, ~/.netrc for http; a server may also say so of a file "
            "that is not there when listing is not allowed"
        )
    if 400 < status < 500 and status not in (408, 425, 429):  # 400 is also aiohttp's word for a garbled answer
        return str(status), ValueError(f"{url}: the server refuses with HTTP {status}: check the address")
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no byte for {STALL_SECONDS:g} s", None
    if isinstance(error, _WrongBody):
        return str(error), None
    return f"HTTP {status}" if status else _plain(f"{type(error).__name__}: {error}"), None


def _plain(text: object) -> str:
    """One short line without the queries of URLs, which may hold signatures."""
    return re.sub(r"\?\S+", "?...", " ".join(str(text).split()))[:160]


def _check_body(path: Path, size: int | None, sha256: str | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise _WrongBody(f"{found:,} bytes came where the index says {size:,}")
    if sha256 is not None and (digest := sha256_of_file(path)) != sha256:
        raise _WrongBody(f"wrong content: sha256 {digest[:12]} where the index says {sha256[:12]}")


def _file_system(url: str) -> Any:
    return _new_file_system(url.partition(":")[0], STALL_SECONDS, os.getpid())


@functools.lru_cache
def _new_file_system(scheme: str, stall_seconds: float, process: int) -> Any:
    """One of fsspec's file systems; each process has its own, because they do not outlive a fork."""
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise ValueError(f"{scheme}:// needs packages that are not installed: "
                         f"{how_to_install(EXTRAS[scheme])}") from None  # fmt: skip
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        once = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds, "retries": {"total_max_attempts": 1}}
        options |= {"config_kwargs": once, "anon": not _has_aws_credentials(), "max_concurrency": 4}
        system = kind(default_block_size=RANGE_BYTES, **options)
        system.retries = 1  # trying again is our business: it is told, and the body checked
        return system
    import aiohttp

    # no limit on the whole: a shard may take long
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    if scheme == "gs":
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what we tell in one line
        return kind(requests_timeout=timeout, **options)
    return kind(client_kwargs={"timeout": timeout, "trust_env": True}, **options)


def _has_aws_credentials() -> bool:
    import botocore.session

    try:
        return botocore.session.get_session().get_credentials() is not None
    except Exception as error:
        raise ValueError(f"the AWS_* settings of the environment are wrong: {_plain(error)}") from None


def _limit(path: Path, max_bytes: int) -> Any:
    """A callback for fsspec that ends a download when the file has more than `max_bytes`."""
    from fsspec.callbacks import Callback

    class Limit(Callback):
        def relative_update(self, inc: int = 1) -> None:
            # not the sum of what came: a backend that starts over would add it up
            if path.stat().st_size > max_bytes:
                raise _WrongBody(f"more than {max_bytes:,} bytes came")

    return Limit()
