"""Tar files by position: the header of a member to write, and a strict walk over the members of a file.

A shard or an input may come from anywhere, so the walk takes regular files with plain names and nothing else: no links,
devices or sparse files, no absolute names, no "..". Nothing is ever extracted. Python's own reader takes a damaged
header for the end of the archive; here everything after the last member must be zeros.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_PICKLES = frozenset({"pyd", "pkl", "pickle"})
_MOST_HEADER_BYTES = 1 << 20  # of a long name or a pax header; some programs write much there, none that much
# what tarfile lets out when a header is damaged or made up: it decodes, converts and recurses on what the header says
_HEADER_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError)


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
    """The members of an uncompressed tar, in order; `ValueError` that names `where` for any but a plain, whole one.

    Folders are passed over: nothing is extracted, so they do nothing. `file` is seekable; between two members it may be
    moved. Memory stays flat, whatever the number of members and whatever sizes their headers claim.
    """
    size = file.seek(0, 2)
    file.seek(0)
    archive, end = None, 0
    while True:
        try:
            archive = archive or tarfile.open(fileobj=_Headers(file), mode="r:")
            info = archive.next()
        except _HEADER_ERRORS as error:
            raise ValueError(f"{where} is not a whole, uncompressed tar file ({error})") from None
        if info is None:
            break
        archive.members.clear()  # it keeps all of them otherwise
        archive.pax_headers.clear()  # and what a global header says of those to come
        _check(info, size, where)
        end = info.offset_data + (0 if info.isdir() else -(-info.size // BLOCK) * BLOCK)
        if not info.isdir():
            yield Member(info.name, info.offset_data, info.size, end)
    check_end(file, end, where)


def samples(file: BinaryIO, where: str) -> Iterator[tuple[str, list[Member]]]:
    """The samples of a WebDataset tar, as key and members: adjacent ones that share the name up to its first dot.

    `ValueError` as of `members`, and for a pickle, which can run any code when it is loaded.
    """
    for key, sample in groupby(members(file, where), lambda member: sample_key(member.name)):
        found = list(sample)
        for member in found:
            if _PICKLES & set(member.name.lower().rpartition("/")[2].split(".")[1:]):
                raise ValueError(
                    f"{where}: member {member.name!r} is a pickle, which can run any code when it is loaded: refused"
                )
        yield key, found


def sample_key(name: str) -> str:
    """The folder of a member and its name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def check_end(file: BinaryIO, position: int, where: str) -> None:
    """`ValueError` unless `file` holds at least two empty blocks from `position` on and nothing but zeros."""
    file.seek(position)
    length = 0
    while data := file.read(_CHUNK):
        if data.count(0) != len(data):
            raise ValueError(f"{where} is damaged after byte {position + length:,}: no member, and no end of a tar")
        length += len(data)
    if length < 2 * BLOCK:
        raise ValueError(f"{where} is cut short: it has no end-of-archive blocks at byte {position:,}")


class _Headers:
    """A file as tarfile sees it. It reads headers only, and the size of a pax header is whatever that header says."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _check(info: tarfile.TarInfo, size: int, where: str) -> None:
    if not (info.isreg() or info.isdir()) or info.sparse is not None:
        raise ValueError(f"{where}: member {info.name!r} is not a plain file (a link, a device, ...): refused")
    path = PurePosixPath(info.name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in info.name or "\0" in info.name
    if unsafe or not (path.name or info.isdir()):
        raise ValueError(f"{where}: member name {info.name!r} points out of the archive: refused")
    if info.size < 0 or info.offset_data + info.size > size:
        raise ValueError(f"{where} is cut short: member {info.name!r} claims {info.size:,} bytes beyond its end")
