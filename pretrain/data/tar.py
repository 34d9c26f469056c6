"""Tar files by position: the header of a member to write, and a strict walk over the members of a file.

A shard or an input may come from anywhere, so the walk takes regular files with plain names and nothing else: no links,
devices or sparse files, no absolute names, no "..". Nothing is ever extracted. Python's own reader takes a damaged header
for the end of the archive; here everything after the last member must be zeros.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in a tar: its bytes lie at [offset, offset + size); `end` is where the next header may start."""

    name: str
    offset: int
    size: int
    end: int


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file: owner 0, mode 644, mtime 0, so nothing of the machine or the hour."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def end_of_archive(position: int) -> bytes:
    """What follows the last member at `position`: two empty blocks, then filled up to a whole record."""
    end = 2 * BLOCK
    return b"\0" * (end + -(position + end) % tarfile.RECORDSIZE)


def members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The members of an uncompressed tar, in order. `ValueError` that names `where` for anything but a plain, whole one.

    `file` is seekable; between two members it may be moved.
    """
    size = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                _check(info, size, where)
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                yield Member(info.name, info.offset_data, info.size, end)
                archive.members.clear()  # it keeps all of them otherwise
    except tarfile.TarError as error:
        raise ValueError(f"{where} is not a whole, uncompressed tar file ({error})") from None
    check_end(file, end, where)


def check_end(file: BinaryIO, position: int, where: str) -> None:
    """`ValueError` unless `file` holds at least two empty blocks from `position` on and nothing but zeros."""
    file.seek(position)
    length = 0
    while data := file.read(_CHUNK):
        if data.count(0) != len(data):
            raise ValueError(f"{where} is damaged after byte {position + length:,}: neither a member nor the end of a tar")
        length += len(data)
    if length < 2 * BLOCK:
        raise ValueError(f"{where} is cut short: it has no end-of-archive blocks at byte {position:,}")


def _check(info: tarfile.TarInfo, size: int, where: str) -> None:
    if not info.isreg() or info.sparse is not None:
        raise ValueError(f"{where}: member {info.name!r} is not a plain file (a link, a device, ...): refused")
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\\" in info.name or "\0" in info.name or not path.name:
        raise ValueError(f"{where}: member name {info.name!r} points out of the archive: refused")
    if info.size < 0 or info.offset_data + info.size > size:
        raise ValueError(f"{where} is cut short: member {info.name!r} claims {info.size:,} bytes beyond its end")
