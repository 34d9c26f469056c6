"""The files of the input: which of what was named is read, each once, and what is passed over, with the reason."""

import fnmatch
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain.examples.decompress import check_content, content_suffix, is_compressed

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .pl .r .jl .sh .sql .lua "
    ".scala .kt .swift .html .css .jsonl".split()
)
TABLE_SUFFIXES = frozenset({".json", ".csv", ".tsv"})  # of a folder, only those that --include names
CONTAINER_SUFFIXES = frozenset({".parquet", ".tar"})
_ARCHIVES = frozenset(".tgz .tbz2 .txz .zip .7z .rar .bz2 .xz".split())
OTHER_KIND = "of a kind that is not read"


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
    files: list[InputFile]
    passed_over: list[PassedOver]

    def note(self) -> str:
        """What a user should know of, or an empty string."""
        notes = []
        for reason, count in Counter(reason for _, reason in self.passed_over).items():
            names = [name for name, why in self.passed_over if why == reason]
            kinds = Counter(content_suffix(Path(name)) or "no suffix" for name in names).most_common(3)
            which = f"first: {names[0]}"
            if reason == OTHER_KIND:
                which = f"{', '.join(f'{kind} {n:,}' for kind, n in kinds)}: --include GLOB takes them"
            notes.append(f"{count:,} {reason} ({which})")
        return f"passed over: {'; '.join(notes)}" if notes else ""


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
    return Found([_checked(path) for path in search.files.values()], search.passed_over)


class _Search:
    def __init__(self, include: Sequence[str], exclude: Sequence[str]):
        self.include, self.exclude = include, exclude
        self.files: dict[str, Path] = {}  # by what they really are
        self.folders: dict[str, Path] = {}
        self.passed_over: list[PassedOver] = []

    def take(self, path: Path) -> None:
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(_real(str(path.parent)), path.name)
        if real in self.files:
            self.passed_over.append(PassedOver(str(path), "read already, by another name"))
        else:
            self.files[real] = path

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
                self.take(path)
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


def _checked(path: Path) -> InputFile:
    """The file, which can be opened and is what its name says: before any work, not after hours of it."""
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
            return InputFile(str(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): see its permissions, {leave_out}") from None
