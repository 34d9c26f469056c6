"""Raw input to documents: text, JSONL (both also .gz, .zst), Parquet, WebDataset tars; what went in is counted.

A text file is one document; each line of a .jsonl file is one, each row of a .parquet, .json, .csv or .tsv file, each
.txt or .json member of a .tar file. Documents are read one at a time, so memory grows with the longest
document, not with the corpus. An uncompressed JSONL file can be cut into byte ranges, for several processes to read.
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.examples.decompress import DAMAGE, content_suffix
from pretrain.prepare import readers
from pretrain.prepare.finding import TABLE_SUFFIXES, InputFile

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot
_BLOCK = 1 << 20
BAD_ROWS = 100  # that are kept with their reasons


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes [start, end) of a file on disk: all, or of an uncompressed JSONL file the lines that start there."""

    file: str
    start: int
    end: int

    @property
    def path(self) -> Path:
        return Path(self.file)


@dataclass(frozen=True)
class Document:
    """A text, how many bytes of input (on disk) were read since the document before, and where it was found."""

    text: str
    input_bytes: int
    source: str  # "path", "path, line 12", "path, byte 4096" (in a byte range), "path, row 7", "path, member a/b.txt"
    number: int  # which one of its piece, counted from 1 with those that are no documents: see `source_of`


@dataclass
class Counts:
    """What reading met: documents, empty ones (left out), those with invalid characters (replaced by U+FFFD), members
    of tars that are no documents, and bad rows that were to be left out.
    """

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    ignored_members: int = 0
    invalid_files: list[str] = field(default_factory=list)  # the first few
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)  # the first, with file, place and reason

    def merge(self, other: "Counts") -> None:
        """Add what was read after this."""
        self.documents += other.documents
        self.empty += other.empty
        self.invalid += other.invalid
        self.ignored_members += other.ignored_members
        self.invalid_files = list(dict.fromkeys(self.invalid_files + other.invalid_files))[:3]
        self.bad += other.bad
        self.bad_rows = (self.bad_rows + other.bad_rows)[:BAD_ROWS]

    def add_invalid(self, path: Path) -> None:
        self.invalid += 1
        if len(self.invalid_files) < 3 and str(path) not in self.invalid_files:
            self.invalid_files.append(str(path))

    def add_bad(self, reason: str) -> None:
        self.bad += 1
        if len(self.bad_rows) < BAD_ROWS:
            self.bad_rows.append(reason)

    def summary(self) -> str:
        """What a user should know of, or an empty string."""
        notes = [f"{self.empty:,} empty documents left out"] if self.empty else []
        if self.bad:
            notes.append(f"{self.bad:,} bad rows left out (first: {self.bad_rows[0]})")
        if self.invalid:
            names = ", ".join(self.invalid_files)
            notes.append(f"{self.invalid:,} documents with invalid UTF-8, replaced by U+FFFD (first: {names})")
        if self.ignored_members:
            notes.append(f"{self.ignored_members:,} members of tar files are not texts (.txt, .json) and were ignored")
        return "; ".join(notes)


def cut(files: Sequence[InputFile], piece_bytes: int) -> list[Piece]:
    """The files in pieces: an uncompressed JSONL file in ranges of `piece_bytes`, any other file whole."""
    pieces = []
    for file in files:
        step = piece_bytes if file.path.suffix.lower() == ".jsonl" else file.bytes
        starts = range(0, file.bytes, step) if file.bytes else [0]
        pieces += [Piece(file.file, start, min(start + step, file.bytes)) for start in starts]
    return pieces


def sha256_of(piece: Piece) -> str:
    """The hash of the piece's bytes on disk."""
    digest, left = hashlib.sha256(), piece.end - piece.start
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise ValueError(f"{piece.path} has become shorter since it was listed: leave it be, and start again")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def is_held_out(data: bytes, fraction: float) -> bool:
    """Whether a document (its text in UTF-8) is of the validation split: by its hash, whatever its place or name."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") < fraction * 2**64


def read_documents(
    pieces: Sequence[Piece | InputFile], text_key: str, counts: Counts, strict: bool = False, drop_bad: bool = False
) -> Iterator[Document]:  # fmt: skip
    """The documents of `pieces` that are not empty, in order, counted in `counts`.

    `text_key` names the field of a JSON object, or the Parquet column, that holds the text. `ValueError` for what
    cannot be read, with its file and place; with `strict` also for invalid UTF-8, else it is replaced and counted. With
    `drop_bad` rows that are no JSON, or have no text, are left out and counted.
    """
    unreported = 0  # bytes of input whose documents were empty
    for piece in pieces:
        if isinstance(piece, InputFile):
            piece = Piece(piece.file, 0, piece.bytes)
        position = 0
        for number, raw in enumerate(_raw_documents(piece, text_key), 1):
            if isinstance(raw, readers.Ignored):
                counts.ignored_members += 1
                continue
            unreported += raw.position - position
            position = raw.position
            try:
                text = _text(raw, piece, text_key, counts, strict)
            except ValueError as error:
                if not (drop_bad and raw.is_json):
                    raise
                counts.add_bad(str(error))
                continue
            if text:
                counts.documents += 1
                source = f"{piece.path}, {raw.part}" if raw.part else str(piece.path)
                yield Document(text, unreported, source, number)
                unreported = 0
            else:
                counts.empty += 1


def source_of(piece: Piece, number: int, text_key: str) -> str:
    """Where the document of that `number` lies, for a user to find: its `source`, in a byte range too with the line.

    The piece is read again up to there: for the few that are named, instead of a text for each that may be.
    """
    raw = next(itertools.islice(_raw_documents(piece, text_key), number - 1, None), None)
    if not isinstance(raw, readers.Raw):
        raise ValueError(f"{piece.path} was changed since it was read: run the same command again")
    return _located(piece, raw)


def _located(piece: Piece, raw: readers.Raw) -> str:
    part = raw.part
    if part.startswith("byte "):
        part = f"line {readers.line_number(piece.path, int(part.removeprefix('byte ')))}"
    return f"{piece.path}{part and ', '}{part}"


def _raw_documents(piece: Piece, text_key: str) -> Iterator[readers.Raw | readers.Ignored]:
    if piece.end == 0:
        return iter([readers.Raw(b"", "", 0)])  # an empty file, of whatever kind, is an empty document
    suffix = content_suffix(piece.path)
    if suffix == ".jsonl":
        return _undamaged(readers.lines(piece.path, piece.start, piece.end), piece.path)
    assert piece.start == 0, piece
    if suffix == ".parquet":
        return readers.rows(piece.path, text_key)
    if suffix == ".tar":
        return readers.members(piece.path)
    if suffix in TABLE_SUFFIXES:
        return _undamaged(readers.table(piece.path), piece.path)
    return _undamaged(readers.whole(piece.path), piece.path)


def _undamaged(raws: Iterator[readers.Raw], path: Path) -> Iterator[readers.Raw]:
    try:
        yield from raws
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def _text(raw: readers.Raw, piece: Piece, text_key: str, counts: Counts, strict: bool) -> str:
    """The text of a raw document. `ValueError` with the file and the place of what is wrong with it."""
    try:
        text, is_valid = _decode(raw.data, strict)
        if raw.is_json:
            text, is_clean = _clean(_json_text(text, text_key), strict)
            is_valid = is_valid and is_clean
    except ValueError as error:
        raise ValueError(f"{_located(piece, raw)}: {error}") from None
    if not is_valid:
        counts.add_invalid(piece.path)
    return text


def _decode(data: bytes, strict: bool) -> tuple[str, bool]:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError as error:
        if strict:
            place = f"{error.reason}, byte {error.start:,} of it"
            raise ValueError(f"invalid UTF-8 ({place}): --strict refuses it") from None
        return data.decode("utf-8", "replace"), False


def _json_text(data: str, text_key: str) -> str:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no field {text_key!r} (there is: {keys}); name it with --text-key")
    if not isinstance(record[text_key], str):
        raise ValueError(f"field {text_key!r} is not text; name the right one with --text-key")
    return record[text_key]


def _clean(text: str, strict: bool) -> tuple[str, bool]:
    cleaned, halves = _SURROGATE.subn("\ufffd", text)
    if halves and strict:
        raise ValueError("half a character (a lone surrogate, which UTF-8 cannot hold): --strict refuses it")
    return cleaned, not halves
