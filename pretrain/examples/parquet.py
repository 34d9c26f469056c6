"""Parquet files, a few rows at a time: the values of a column of text, or whole rows. The home of pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.cli import how_to_install

ROWS = 64  # read at once; long rows must fit in memory together
_BUFFER = 1 << 20


def texts(path: Path, column: str) -> Iterator[tuple[int, bytes]]:
    """The values of a column of text, in UTF-8, each after the number of rows in the file; a null is empty.

    As bytes: pyarrow does not check that text is valid UTF-8. `ValueError` for a damaged file or no such column.
    """
    with _opened(path) as (file, pyarrow):
        _check_column(file.schema_arrow, column, path, pyarrow.types)
        for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
            values = batch.column(0)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            for value in values.cast(pyarrow.large_binary()).to_pylist():
                yield file.metadata.num_rows, value or b""


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, column -> value in Python's own types. `ValueError` for a damaged file, or two columns of one name."""
    with _opened(path) as (file, _):
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path} has two columns {twice[0]!r}: rename one")
        for batch in file.iter_batches(ROWS, use_threads=False):
            yield from batch.to_pylist()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open file, and the library."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: {how_to_install('prepare')}") from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
            yield file, pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from None


def _check_column(schema: Any, column: str, path: Path, types: Any) -> None:
    if column not in schema.names:
        names = ", ".join(schema.names[:20])
        raise ValueError(f"{path}: no column {column!r} (there is: {names}); name it with --text-key")
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):  # a column without a value in any row: empty texts
        return
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{path}: column {column!r} is {kind}, not text; name the right one with --text-key")
