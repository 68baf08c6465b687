"""``text``: own texts, a table with a column of texts and a column of class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cl_adapters.benchmarks.base import BenchmarkData, benchmarks
from cl_adapters.benchmarks.data._text_benchmark import TextBenchmarkConfig, check_classes, hold_out
from cl_adapters.benchmarks.data._text_files import Row, read_rows
from cl_adapters.errors import ConfigError, DataError

VALIDATION = frozenset({"val", "valid", "validation", "dev"})


@benchmarks.register("text")
@dataclass(frozen=True, kw_only=True)
class Text(TextBenchmarkConfig):
    """Own texts: a CSV, TSV, JSONL or parquet file with a text and a label per row.

    The test set is another file, or the rows whose split column says so, or a share held out of each class.

    Attributes:
        file: the table.
        text_column: name of the column of texts.
        label_column: name of the column of class names, which are taken as they are.
        test: a second table to test on; the first is then for training, whatever its split column says.
        split_column: name of a column that says "train" or "test" ("validation" rows are left out, or test where
            no row says "test"); used where the file has such a column.
        test_share: share of each class that becomes the test set where neither a file nor a column says it.
    """

    argument: ClassVar[str | None] = "file"
    summary: ClassVar[str] = "own texts: a CSV, TSV, JSONL or parquet file with a text and a label per row"

    file: str
    text_column: str = "text"
    label_column: str = "label"
    test: str | None = None
    split_column: str = "split"
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        # absolute, so that a run can be resumed from another working folder
        object.__setattr__(self, "file", str(Path(self.file).expanduser().resolve()))
        if self.test is not None:
            object.__setattr__(self, "test", str(Path(self.test).expanduser().resolve()))
        if not 0 < self.test_share < 1:
            raise ConfigError(f"test_share must lie between 0 and 1, got {self.test_share}")

    def load(self, seed: int) -> BenchmarkData:
        """Read the table or tables; the split never follows ``seed``.

        Raises:
            ConfigError: more tasks than classes.
            DataError: a file that cannot be used; names file and line.
        """
        path = Path(self.file)
        rows = self._read(path)
        if self.test is not None:
            train, test = rows, self._read(Path(self.test))
        elif rows[0].split is not None:
            train, test = _by_column(rows, path, self.split_column)
        else:
            train, test = hold_out(rows, self.test_share)
        licence = f"own texts (file {path.name!r}); their licence is not known here"
        return self.assembled("text", check_classes(train, test, str(path)), train, test, licence, seed)

    def _read(self, path: Path) -> list[Row]:
        return read_rows(path, self.text_column, self.label_column, self.split_column)


def _by_column(rows: list[Row], path: Path, column: str) -> tuple[list[Row], list[Row]]:
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        split = (row.split or "").strip().lower()
        split = "validation" if split in VALIDATION else split
        if split not in parts:
            raise DataError(f"{path}: {row.place} has {column} {row.split!r}; expected train, test or validation")
        parts[split].append(row)
    test = parts["test"] or parts["validation"]
    for name, part in (("train", parts["train"]), ("test", test)):
        if not part:
            raise DataError(f"{path}: no row has {column} {name!r}; name another split_column, or give test=FILE")
    return parts["train"], test
