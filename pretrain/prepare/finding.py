"""The files of the input: which of what was named is read, each once, and what is passed over, with the reason."""

import fnmatch
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.examples.decompress import DAMAGE, check_content, content_suffix, decompressed, is_compressed

SOURCE_SUFFIXES = frozenset(
    ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .pl .r .jl .sh .sql .lua .scala .kt .swift .css".split()
)
TEXT_SUFFIXES = SOURCE_SUFFIXES | frozenset(".txt .text .md .rst .tex .html .jsonl".split())
TABLE_SUFFIXES = frozenset({".json", ".csv", ".tsv"})  # of a folder, only those that --include names
CONTAINER_SUFFIXES = frozenset({".parquet", ".tar"})
_ARCHIVES = frozenset(".tgz .tbz2 .txz .zip .7z .rar .bz2 .xz".split())
OTHER_KIND = "of a kind that is not read"
LISTED = 1000  # of the names of files that are told of
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype\s+html|html)\b", re.IGNORECASE)
_HEAD_BYTES = 1024  # of a file, to see what it is


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read; `bytes` is its size on disk. There may be millions: the name is kept as the little it is."""

    file: str
    bytes: int

    @property
    def path(self) -> Path:
        return Path(self.file)


class PassedOver(NamedTuple):
    """What was found and is not read."""

    file: str
    reason: str


class Found(NamedTuple):
    """The files to read, and what a user should know of: names of files passed over, of those read as plain text that
    begin like HTML, and of source code that nobody asked for.
    """

    files: list[InputFile]
    passed_over: list[PassedOver]
    html: list[str]
    source_code: list[str]

    def facts(self) -> dict:
        """What is to be kept of it, as JSON: of each kind that there is the count, and the first names."""
        lists = {
            "passed_over": [one._asdict() for one in self.passed_over[:LISTED]],
            "html": self.html[:LISTED], "source_code": self.source_code[:LISTED],
        }  # fmt: skip
        return {name: {"count": len(getattr(self, name)), "first": first} for name, first in lists.items() if first}

    def notes(self) -> list[str]:
        """Lines to print."""
        lines = [self._passed_over()] if self.passed_over else []
        if self.html:
            lines.append(
                f"{_files(self.html, 'looks', 'look')} like HTML (first: {self.html[0]}): their tags become text: "
                "extract it first (as with trafilatura), or leave them out with --exclude GLOB"
            )
        if self.source_code:
            lines.append(
                f"{_files(self.source_code, 'is', 'are')} source code by name (first: {self.source_code[0]}), of "
                f"{len(self.files):,} that are read: leave them out with --exclude GLOB, or name with --include GLOB "
                "what you mean"
            )
        return lines

    def _passed_over(self) -> str:
        notes = []
        for reason, count in Counter(reason for _, reason in self.passed_over).items():
            names = [name for name, why in self.passed_over if why == reason]
            kinds = Counter(content_suffix(Path(name)) or "no suffix" for name in names).most_common(3)
            which = f"first: {names[0]}"
            if reason == OTHER_KIND:
                which = f"{', '.join(f'{kind} {n:,}' for kind, n in kinds)}: --include GLOB takes them"
            notes.append(f"{count:,} {reason} ({which})")
        return f"passed over: {'; '.join(notes)}"


def _files(names: list[str], one: str, many: str) -> str:
    return f"{len(names):,} file {one}" if len(names) == 1 else f"{len(names):,} files {many}"


def find_files(inputs: Sequence[str | Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Found:
    """The files to read, in order. A file named outright is always taken; of a folder, those with a suffix of texts, or
    those that match a glob of `include`, less those that match one of `exclude` (path within the folder, or a part).
    Links are followed; a folder or file that was met already, by whatever name, is passed over.
    """
    search = _Search(include, exclude)
    for item in map(Path, inputs):
        if item.is_file():
            search.take(item)
        elif item.is_dir():
            search.walk(item)
        else:
            raise ValueError(f"input {item} is not a file or a folder")
    if not search.files:
        suffixes = "a text suffix (.txt, .py, .jsonl, .txt.gz, .parquet, .tar, ...)"
        wanted = f"matches {' '.join(include)}" if include else f"has {suffixes}"
        raise ValueError(f"no file under {' '.join(map(str, inputs))} {wanted}: choose files with --include GLOB")
    html: list[str] = []
    files = [_checked(path, html) for path in search.files.values()]
    are_meant = len(search.source_code) == len(files)
    return Found(files, search.passed_over, html, [] if are_meant else search.source_code)


class _Search:
    def __init__(self, include: Sequence[str], exclude: Sequence[str]):
        self.include, self.exclude = include, exclude
        self.files: dict[str, Path] = {}  # by what they really are
        self.folders: dict[str, Path] = {}
        self.passed_over: list[PassedOver] = []
        self.source_code: list[str] = []  # that was neither named nor included

    def take(self, path: Path, is_meant: bool = True) -> None:
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(_real(str(path.parent)), path.name)
        if real in self.files:
            self.passed_over.append(PassedOver(str(path), "read already, by another name"))
        else:
            self.files[real] = path
            if not is_meant and content_suffix(path) in SOURCE_SUFFIXES:
                self.source_code.append(str(path))

    def walk(self, folder: Path) -> None:
        for path in self._paths(folder):
            inside = path.relative_to(folder)
            has_suffix = path.suffix.lower() in CONTAINER_SUFFIXES or content_suffix(path) in TEXT_SUFFIXES
            if _matches(inside, self.exclude) or self.include and not _matches(inside, self.include):
                continue
            if not path.is_file():
                reason = "links to nothing" if path.is_symlink() else "no plain files"
                self.passed_over.append(PassedOver(str(path), reason))
            elif has_suffix or self.include:
                self.take(path, is_meant=bool(self.include))
            else:
                self.passed_over.append(PassedOver(str(path), OTHER_KIND))

    def _paths(self, folder: Path) -> Iterator[Path]:
        """The names in a folder and the folders in it, sorted, but for what is left out as a whole."""

        def fail(error: OSError) -> None:
            raise error

        for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            here = Path(parent)
            if self.folders.setdefault(_real(parent), here) != here:
                self.passed_over.append(PassedOver(parent, "folders met already, by another name"))
                folders.clear()
                continue
            inside = here.relative_to(folder)
            folders[:] = sorted(name for name in folders if not _matches(inside / name, self.exclude))
            yield from (here / name for name in sorted(names))


@functools.lru_cache(1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _matches(path: Path, globs: Sequence[str]) -> bool:
    names = (path.as_posix(), *path.parts)
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in names)


def _checked(path: Path, html: list[str]) -> InputFile:
    """The file, which can be opened and is what its name says: before any work, not after hours of it. Added to `html`
    if it looks like that.
    """
    leave_out = "or leave it out with --exclude"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(str(path))}: the name is not UTF-8: rename it, {leave_out}") from None
    if path.suffix.lower() in _ARCHIVES:
        raise ValueError(f"{path} is of a kind that is not read: unpack it first, {leave_out}")
    if is_compressed(path) and content_suffix(path) in CONTAINER_SUFFIXES:
        unpack = "gunzip -k" if path.suffix.lower() == ".gz" else "zstd -d"
        raise ValueError(f"{path} is compressed as a whole: run `{unpack} {path}` first")
    try:
        with open(path, "rb") as file:
            check_content(path, file)
            if _is_html(path, file):
                html.append(str(path))
            return InputFile(str(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): see its permissions, {leave_out}") from None


def _is_html(path: Path, file: BinaryIO) -> bool:
    try:
        return bool(_HTML.match(decompressed(path, file).read(_HEAD_BYTES)))
    except (*DAMAGE, OSError):  # said with its name when it is read
        return False
