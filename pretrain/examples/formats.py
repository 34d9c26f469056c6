"""The kinds of files that tables are read from: numbered rows of each, and `ValueError` for what is wrong in it."""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.examples import parquet
from pretrain.examples.decompress import DAMAGE, check_content, content_suffix, decompressed, is_compressed
from pretrain.shards import tar

Row = dict[str, Any]
Numbered = Iterator[tuple[int | str, Row]]  # rows, and the number or name of each in its file
_CARRIAGE_RETURN = re.compile(rb"(?<=\r)(?!\n|$)")  # it ends lines by itself in files of old programs
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON for half a character: whole only when the other half follows
_LONGEST_FIELD = 1 << 30  # of a CSV, in characters; the csv module's own limit is 131,072


def opened(path: Path) -> tuple[str, Numbered]:
    """What the rows of a file are counted in, and the rows; `ValueError` with file and place of what is wrong."""
    suffix = content_suffix(path)
    if suffix not in FORMATS:
        raise ValueError(f"{path} is of a kind that is not read: give one of {', '.join(FORMATS)}")
    with open(path, "rb") as file:
        check_content(path, file)
    unit, read = FORMATS[suffix]
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
                         f'{{"text": ..., "answer_start": ...}}, not {short(value)}')  # fmt: skip
    return texts, starts


def _jsonl(stream: BinaryIO) -> Numbered:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield number, _object(_parse(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _json(stream: BinaryIO) -> Numbered:
    try:
        content = _parse(stream.read())
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
                row = {"id": question["id"], "title": title, "context": paragraph["context"],
                       "question": question["question"]}  # fmt: skip
                if "answers" not in question:  # no word of them is not the word that there are none
                    yield question | row
                    continue
                texts, starts = answers(question["answers"], f"question {question['id']!r}")
                yield row | {"answers": {"text": texts, "answer_start": starts}}
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
    lines = (part for line in stream for part in _CARRIAGE_RETURN.split(line))
    for number, line in enumerate(lines, 1):
        try:
            yield _decode(line)
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
        raise ValueError(f'a row must be an object, as {{"text": ...}}, not {short(row)}')
    return row


def _decode(data: bytes) -> str:
    """UTF-8, with or without the mark that some programs begin it with."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16, not UTF-8: convert the file, as with iconv -f UTF-16 -t UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason}, byte {error.start + 1:,}): convert the file, as with iconv -f LATIN1 -t UTF-8"


def short(value: Any) -> str:
    """A value for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:80] + "..."


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
FORMATS: dict[str, tuple[str, Callable[[Any], Numbered]]] = {
    ".jsonl": ("line", _jsonl), ".json": ("row", _json), ".csv": ("line", _csv),
    ".tsv": ("line", partial(_csv, delimiter="\t")), ".txt": ("", _text), ".parquet": ("row", _parquet),
    ".tar": ("sample", _tar),
}  # fmt: skip
