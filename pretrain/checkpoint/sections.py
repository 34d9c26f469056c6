"""Sections: the stretches of a file that have a hash each. Several processes fill one file, and verify parts of it.

The sections of a file follow each other without a gap, from its first byte to its last.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SECTION_BYTES = 1 << 30  # the longest: what one rank has to verify, however many there are
WRITE_BYTES, READ_BYTES = 1 << 24, 1 << 20  # at once; neither writing, reading nor hashing holds the GIL meanwhile


class Section(NamedTuple):
    """The bytes [start, end) of a file, and their hash."""

    start: int
    end: int
    sha256: str


def cut(start: int, end: int) -> list[tuple[int, int]]:
    """The sections of the stretch [start, end) that one process writes."""
    return [(place, min(place + SECTION_BYTES, end)) for place in range(start, end, SECTION_BYTES)]


class Writer:
    """Writes a stretch of an open file in order, from `start` on, and hashes its sections, which are those of `cut`."""

    def __init__(self, handle: int, start: int, on_bytes: Callable[[int], object] = lambda count: None):
        self.sections: list[Section] = []
        self._handle, self._place, self._on_bytes = handle, start, on_bytes
        self._start, self._digest = start, hashlib.sha256()

    def write(self, data: memoryview) -> None:
        """Write the next bytes. `OSError` where there is no room for them."""
        while data:
            room = self._start + SECTION_BYTES - self._place
            part = data[: min(WRITE_BYTES, room)]
            count = os.pwrite(self._handle, part, self._place)
            self._digest.update(part[:count])
            self._place += count
            self._on_bytes(count)
            data = data[count:]
            if count == room:
                self._end_section()

    def finish(self) -> list[Section]:
        """Wait until all is on the disk; the sections."""
        if self._place > self._start:
            self._end_section()
        os.fsync(self._handle)
        return self.sections

    def _end_section(self) -> None:
        self.sections.append(Section(self._start, self._place, self._digest.hexdigest()))
        self._start, self._digest = self._place, hashlib.sha256()


def verify_section(path: Path, file_bytes: int, section: Section) -> None:
    """Raise `ValueError` when a file is missing or has another size, or one of its sections was changed."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != file_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {file_bytes}")
    digest, buffer, place = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), section.start
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        while count := file.readinto(buffer[: section.end - place]):
            digest.update(buffer[:count])
            place += count
    if digest.hexdigest() != section.sha256:
        raise ValueError(f"{path}, bytes {section.start} to {section.end}: their sha256 is "
                         f"{digest.hexdigest()[:16]}..., the manifest says {section.sha256[:16]}...")  # fmt: skip


def share_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that takes each of these: about as many bytes a rank, and neighbours stay together."""
    total, place, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append((2 * place + size) * ranks // (2 * total))  # where its middle lies
        place += size
    return owners
