"""Tables of examples: JSONL, JSON, CSV, TSV, Parquet, texts and WebDataset tars, read to rows of named columns.

Every mistake is named with its file and place, and nothing is guessed: no row is passed over, no byte replaced.
"""

import difflib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.cli import among
from pretrain.examples.decompress import content_suffix
from pretrain.examples.formats import FORMATS, Row, opened, short


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
    columns: list[str]  # of all rows, in the order in which they first appear
    parts: list[_Part]

    def some(self, count: int) -> "Table":
        """`count` rows, spread evenly over the table; 0, or as many as there are: all of them."""
        if not 0 < count < len(self.rows):
            return self
        return self.only([index * len(self.rows) // count for index in range(count)])

    def only(self, kept: Sequence[int]) -> "Table":
        """The rows of these numbers, which rise."""
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

    def column(self, name: str, key: str) -> "Column":
        """A column. `key`: the setting that names it, as "task.label". `ValueError` when there is none of that name."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{self.location} has no column {name!r}{meant}: there is {among(name, self.columns)}; "
                             f"name the right one with {key}=...")  # fmt: skip
        return Column(self.rows, name, key)

    def texts(self, name: str, key: str) -> list[str]:
        """The values of a column of text; `ValueError` where there is none, with its place."""
        column, found = self.column(name, key), []
        for index in range(len(self.rows)):
            try:
                found.append(column.text(index))
            except ValueError as error:
                raise ValueError(f"{self.place(index)}: {error}") from None
        return found


class Column(NamedTuple):
    """A column of a table, read row by row: its `ValueError`s say what is wrong with a row, not which one it is."""

    rows: list[Row]
    name: str
    key: str

    def value(self, index: int) -> Any:
        """What a row has there, which must not be null."""
        value = self.rows[index].get(self.name)
        if value is None or is_nan(value):
            lack = "is missing" if self.name not in self.rows[index] else "is null" if value is None else "is NaN"
            raise ValueError(f"column {self.name!r} ({self.key}) {lack}: give it a value, or leave the row out")
        return value

    def text(self, index: int) -> str:
        """What a row has there, which must be a string."""
        value = self.value(index)
        if not isinstance(value, str):
            raise ValueError(f"column {self.name!r} holds {short(value)}, not text: name another column with "
                             f"{self.key}=..., or write it in quotes")  # fmt: skip
        return value


def is_nan(value: Any) -> bool:
    """Whether it is the number that Parquet and pandas have where there is no value."""
    return isinstance(value, float) and math.isnan(value)


def plain(value: Any) -> Any:
    """A value as JSON can say it: what only Parquet has (times, decimals, bytes, nan) as text."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    is_known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_known else str(value)


def read_table(locations: str | list[str], key: str) -> Table:
    """The rows of files, one after the other; of a folder, its files in the order of their names.

    `key`: the setting that names them, as "data.train", for messages. Read are .jsonl, .json (an array of objects, or
    SQuAD's {"data": [...]}), .csv, .tsv (with a header), .txt (the file is one row, column "text"), these also as .gz
    and .zst; .parquet; and WebDataset's .tar (a sample is a row). `ValueError` with the place of whatever is wrong.
    """
    names = [locations] if isinstance(locations, str) else list(locations)
    rows: list[Row] = []
    parts: list[_Part] = []
    for path in (path for name in names for path in _files(name, key)):
        unit, numbered = opened(path)
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
    return Table(", ".join(names), rows, list(columns), parts)


def _files(name: str, key: str) -> list[Path]:
    path = Path(name)
    if "://" in name or not path.exists():
        remedy = "copy it here first: tables are read from files" if "://" in name else "is not there"
        raise ValueError(f"{key}: {name}: {remedy}")
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and content_suffix(file) in FORMATS)
    if not found:
        raise ValueError(f"{key}: the folder {name} holds no file of a kind that is read: {', '.join(FORMATS)}")
    return found
