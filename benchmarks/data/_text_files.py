"""Reading tables of labelled texts: CSV, TSV, JSON lines, parquet. A bad file is one error that names file and line."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cl_adapters.errors import DataError

FIELD_LIMIT = 2**27
"""Characters in one CSV field; the csv module's own limit of 131,072 is less than a long document."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled text.

    Attributes:
        text: as in the file.
        label: class name as in the file, without spaces around it; numbers as text.
        split: value of the split column; None where there is none.
        place: "intents.csv:17", for messages.
    """

    text: str
    label: str
    split: str | None
    place: str


def read_rows(path: Path, text_column: str, label_column: str, split_column: str | None = None) -> list[Row]:
    """Read a table of labelled texts; the file's suffix says its format.

    Args:
        path: a ``.csv``, ``.tsv``, ``.jsonl`` (``.ndjson``) or ``.parquet`` file, in UTF-8 where it is text.
        text_column: name of the column of texts.
        label_column: name of the column of class names or numbers.
        split_column: name of the column that says "train" or "test"; used where the file has it.

    Raises:
        DataError: no such file, another format, a missing column, a row that cannot be used: names file and line.
    """
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {problem}; expected a table of texts ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; read are {', '.join(READERS)}")
    with readable(path):
        rows = [
            _row(values, f"{path.name}:{line}", path, line, (text_column, label_column, split_column))
            for line, values in reader(path)
        ]
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _row(values: Mapping[str, Any], place: str, path: Path, line: int, columns: tuple[str, str, str | None]) -> Row:
    text_column, label_column, split_column = columns
    for column in (text_column, label_column):
        if column not in values:
            found = ", ".join(repr(name) for name in values)
            raise DataError(
                f"{path}, line {line}: no column {column!r}; it has {found}. Name the columns with text_column and "
                "label_column"
            )
    text, label = values[text_column], values[label_column]
    if not isinstance(text, str) or not text.strip():
        shown = "is empty" if text is None or text == "" or isinstance(text, str) else f"is no text but {text!r}"
        raise DataError(f"{path}, line {line}: {text_column!r} {shown}")
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise DataError(f"{path}, line {line}: {label_column!r} must be a class name or a whole number, not {label!r}")
    split = None if split_column is None else values.get(split_column)
    return Row(text=text, label=str(label).strip(), split=None if split is None else str(split), place=place)


def _separated(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                header = next(reader, None)
                if header is None:
                    return
                if len(set(header)) < len(header):
                    raise DataError(f"{path}, line 1: two columns have the same name in {header}")
                line = reader.line_num + 1  # where the row begins: quoted texts may run over several lines
                for cells in reader:
                    if cells and len(cells) != len(header):
                        raise DataError(
                            f"{path}, line {line}: {len(cells)} fields, but the header has {len(header)}; put texts "
                            "with a separator or a line break in double quotes"
                        )
                    if cells:
                        yield line, dict(zip(header, cells, strict=True))
                    line = reader.line_num + 1
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                values = json.loads(content)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, line {line}: not JSON ({error}); expected one object per line") from error
            if not isinstance(values, dict):
                raise DataError(f"{path}, line {line}: expected an object with the columns as keys")
            yield line, values


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        wrong: Any = importlib.import_module("pyarrow").ArrowException
    except ImportError as error:
        raise DataError(
            f"{path}: parquet files need the package pyarrow: pip install pyarrow, or save the table as CSV"
        ) from error
    try:
        line = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    line += 1
                    yield line, values
    except wrong as error:
        raise DataError(f"{path}: no parquet file, or a damaged one ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
