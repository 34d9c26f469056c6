"""Tables of examples: JSONL, JSON, CSV, TSV, Parquet, texts and WebDataset tars, read to rows of named columns.

Every mistake is named with its file and place, and nothing is guessed: no row is passed over, no byte replaced.
"""

import csv
import difflib
import hashlib
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pretrain.data import parquet, tar
from pretrain.data.decompress import DAMAGE, content_suffix, decompressed, is_compressed

Row = dict[str, Any]
Numbered = Iterator[tuple[int | str, Row]]  # rows, and the number or name of each in its file
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON for half a character: whole only when the other half follows
_LONGEST_FIELD = 1 << 30  # of a CSV, in characters; the csv module's own limit is 131,072
_BLOCK = 1 << 20


class _Part(NamedTuple):
    """The rows of one file: from row `first` of the table on."""

    first: int
    path: str
    unit: str  # what is counted in it: "line", "row", ...; "" for a file that is one row
    numbers: list[int | str]


@dataclass(frozen=True)
class Table:
    """Rows of named columns, as read from files; a column may be missing in some rows."""

    location: str  # the files or folders, as they were named
    rows: list[Row]
    sha256: str  # of the bytes of the files, one after the other
    columns: list[str]  # of all rows, in the order in which they first appear
    parts: list[_Part]

    def some(self, count: int) -> "Table":
        """`count` rows, spread evenly over the table; 0, or as many as there are: all of them."""
        if not 0 < count < len(self.rows):
            return self
        kept = [index * len(self.rows) // count for index in range(count)]
        parts = []
        for part in self.parts:
            mine = [index for index in kept if part.first <= index < part.first + len(part.numbers)]
            numbers = [part.numbers[index - part.first] for index in mine]
            first = parts[-1].first + len(parts[-1].numbers) if parts else 0
            parts += [part._replace(first=first, numbers=numbers)] if numbers else []
        return replace(self, rows=[self.rows[index] for index in kept], parts=parts)

    def place(self, index: int) -> str:
        """Where a row comes from, as "train.jsonl, line 12"."""
        part = self.parts[bisect_right([part.first for part in self.parts], index) - 1]
        number = part.numbers[index - part.first]
        return f"{part.path}, {part.unit} {number}" if part.unit else part.path

    def column(self, name: str, key: str) -> list[Any]:
        """The values of a column, one a row. `key`: the setting that names the column, as "task.label".

        `ValueError` when there is no such column, or a row has no value (or null) there.
        """
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{self.location} has no column {name!r}{meant}: there is {', '.join(self.columns)}; "
                             f"name the right one with {key}=...")  # fmt: skip
        values = [row.get(name) for row in self.rows]
        for index, value in enumerate(values):
            if value is None:
                lack = "is null" if name in self.rows[index] else "is missing"
                raise ValueError(f"{self.place(index)}: column {name!r} ({key}) {lack}: give it a value, or leave the "
                                 "row out")  # fmt: skip
        return values

    def texts(self, name: str, key: str) -> list[str]:
        """The values of a column of text; `ValueError` as of `column`, and where one is not a string."""
        values = self.column(name, key)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"{self.place(index)}: column {name!r} holds {_short(value)}, not text: name another "
                                 f"column with {key}=..., or write it in quotes")  # fmt: skip
        return values


def read_table(locations: str | list[str], key: str) -> Table:
    """The rows of files, one after the other; of a folder, its files in the order of their names.

    `key`: the setting that names them, as "data.train", for messages. Read are .jsonl, .json (an array of objects, or
    SQuAD's {"data": [...]}), .csv, .tsv (with a header), .txt (the file is one row, column "text"), these also as .gz
    and .zst; .parquet; and WebDataset's .tar (a sample is a row). `ValueError` with the place of whatever is wrong.
    """
    names = [locations] if isinstance(locations, str) else list(locations)
    digest, rows, parts = hashlib.sha256(), [], []
    for path in (path for name in names for path in _files(name, key)):
        _hash(path, digest)
        unit, numbered = _opened(path)
        part = _Part(len(rows), str(path), unit, [])
        for number, row in numbered:
            part.numbers.append(number)
            rows.append(row)
        if not part.numbers:
            raise ValueError(f"{path} holds no rows: give a file that has some, or leave it out of {key}")
        parts.append(part)
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return Table(", ".join(names), rows, digest.hexdigest(), list(columns), parts)


def answers(value: Any, place: str) -> tuple[list[str], list[int]]:
    """The answers to a question and where they start, of either spelling: {"text": [...], "answer_start": [...]}, or
    a list of {"text", "answer_start"}. `ValueError` with `place` for anything else.
    """
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {name: [item.get(name) for item in value] for name in ("text", "answer_start")}
    texts, starts = (value.get(n) if isinstance(value, dict) else None for n in ("text", "answer_start"))
    is_whole = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not is_whole or not all(isinstance(t, str) and type(s) is int for t, s in zip(texts, starts, strict=True)):
        raise ValueError(f'{place}: answers must be {{"text": [...], "answer_start": [...]}} or a list of '
                         f'{{"text": ..., "answer_start": ...}}, not {_short(value)}')  # fmt: skip
    return texts, starts


def _files(name: str, key: str) -> list[Path]:
    path = Path(name)
    if "://" in name or not path.exists():
        remedy = "copy it here first: tables are read from files" if "://" in name else "is not there"
        raise ValueError(f"{key}: {name}: {remedy}")
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and content_suffix(file) in _FORMATS)
    if not found:
        raise ValueError(f"{key}: the folder {name} holds no file of a kind that is read: {', '.join(_FORMATS)}")
    return found


def _hash(path: Path, digest: Any) -> None:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)


def _opened(path: Path) -> tuple[str, Numbered]:
    """What the rows of a file are counted in, and the rows; `ValueError` with file and place of what is wrong."""
    suffix = content_suffix(path)
    if suffix not in _FORMATS:
        raise ValueError(f"{path} is of a kind that is not read: give one of {', '.join(_FORMATS)}")
    unit, read = _FORMATS[suffix]
    if suffix in (".parquet", ".tar"):
        if is_compressed(path):
            raise ValueError(f"{path} is compressed as a whole: unpack it first")
        return unit, read(path)
    return unit, _from_stream(path, read)


def _from_stream(path: Path, read: Callable[[BinaryIO], Numbered]) -> Numbered:
    try:
        with open(path, "rb") as raw:
            yield from read(decompressed(path, raw))
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}" if str(error).startswith("line ") else f"{path}: {error}") from None


def _jsonl(stream: BinaryIO) -> Numbered:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                yield number, _object(row)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _json(stream: BinaryIO) -> Numbered:
    try:
        content = _parse(stream.read().removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        one_a_line = "; if each line is an object of its own, name the file .jsonl"
        raise ValueError(f"{error}{one_a_line if 'Extra data' in str(error) else ''}") from None
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise ValueError('it must be an array of objects, or an object with an array "data" (as SQuAD)')
    number = 0
    for item in items:
        is_squad = isinstance(item, dict) and "paragraphs" in item
        for row in _squad(item) if is_squad else [item]:
            number += 1
            try:
                yield number, _object(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None


def _squad(article: Row) -> Iterator[Row]:
    """The questions of an article of SQuAD (Rajpurkar et al. 2016, 2018); an impossible one has no answers."""
    title = article.get("title", "")
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                texts, starts = answers(question.get("answers", []), f"question {question['id']!r}")
                found = {"text": texts, "answer_start": starts}
                yield {"id": question["id"], "title": title, "context": paragraph["context"],
                       "question": question["question"], "answers": found}  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"article {title!r} is not as in SQuAD: paragraphs with context and qas, these with id, "
                         f"question and answers ({type(error).__name__}: {error})") from None  # fmt: skip


def _csv(stream: BinaryIO, delimiter: str = ",") -> Numbered:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_decoded(stream), delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        for fields in reader:
            if header is None:
                header = _checked_header(fields)
            elif fields:
                if len(fields) != len(header):
                    raise ValueError(f"line {line}: {len(fields)} fields, and the header names {len(header)}: put a "
                                     "field that holds the separator or a new line in double quotes")  # fmt: skip
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}: a field that begins with a double quote must end with one, and those "
                         "inside it are doubled") from None  # fmt: skip


def _checked_header(names: list[str]) -> list[str]:
    wrong = [name for name in names if not name.strip() or names.count(name) > 1]
    if wrong or not names:
        raise ValueError(f"line 1: it must name the columns, each once (there is: {', '.join(map(repr, names))})")
    return names


def _decoded(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def _text(stream: BinaryIO) -> Numbered:
    if text := _decode(stream.read()):
        yield "", {"text": text}


def _parquet(path: Path) -> Numbered:
    number = 0
    try:
        for number, row in enumerate(parquet.rows(path), 1):
            yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after row {number}: {_not_utf8(error)}") from None


def _tar(path: Path) -> Numbered:
    """The samples of a WebDataset tar: the members of KEY.json, and of KEY.txt, KEY.cls, ... a column each."""
    with open(path, "rb") as file:
        for key, members in tar.samples(file, str(path)):
            row: Row = {}
            for member in members:
                name = member.name.removeprefix(key + ".")
                file.seek(member.offset)
                try:
                    columns = _columns(name, file.read(member.size))
                    if twice := row.keys() & columns:
                        raise ValueError(f"the column {min(twice)!r} is there already: rename one")
                    row |= columns
                except ValueError as error:
                    raise ValueError(f"{path}, member {member.name}: {error}") from None
            yield key, row


def _columns(name: str, data: bytes) -> Row:
    if name.rpartition(".")[2] == "json":
        return _object(_parse(data))
    text = _decode(data)
    return {name: int(text) if name == "cls" and re.fullmatch(r"\s*-?[0-9]+\s*", text) else text}


def _parse(data: bytes) -> Any:
    """The content of JSON in UTF-8, in which no object says a key twice and every number is one."""
    try:
        content = _DECODER.decode(_decode(data))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if _HALF.search(data):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate), which is no text: write U+FFFD there") from None
    return content


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = {sys.intern(name): value for name, value in pairs}  # a million rows share their keys
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice: leave one out")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON: write null, or leave the row out")


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object, as {{"text": ...}}, not {_short(row)}')
    return row


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason}, byte {error.start + 1:,}): convert the file, as with iconv -f LATIN1 -t UTF-8"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:80] + "..."


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
_FORMATS: dict[str, tuple[str, Callable[[Any], Numbered]]] = {
    ".jsonl": ("line", _jsonl), ".json": ("row", _json), ".csv": ("line", _csv),
    ".tsv": ("line", partial(_csv, delimiter="\t")), ".txt": ("", _text), ".parquet": ("row", _parquet),
    ".tar": ("sample", _tar),
}  # fmt: skip
