"""``banking77``: 77 intents of customers of a bank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cl_adapters.benchmarks.base import BenchmarkData, benchmarks
from cl_adapters.benchmarks.data._text_benchmark import TextBenchmarkConfig, check_classes
from cl_adapters.benchmarks.data._text_files import Row, read_rows
from cl_adapters.errors import DataError

COUNTS = {"train": 10_003, "test": 3_080}
NUM_CLASSES = 77
LICENCE = "CC BY 4.0 (Casanueva et al., NLP4ConvAI 2020: Banking77; github.com/PolyAI-LDN/task-specific-datasets)"


@benchmarks.register("banking77")
@dataclass(frozen=True, kw_only=True)
class Banking77(TextBenchmarkConfig):
    """Banking77: 10,003 training and 3,080 test queries of 77 intents (Casanueva et al., NLP4ConvAI 2020).

    Attributes:
        folder: holds ``train.csv`` and ``test.csv`` of the authors.
        tasks: number of tasks that the intents are dealt into: 7 of 11.
    """

    argument: ClassVar[str | None] = "folder"
    summary: ClassVar[str] = "Banking77: 77 intents of bank customers, 10,003 + 3,080 queries (train.csv, test.csv)"

    folder: str
    tasks: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "folder", str(Path(self.folder).expanduser().resolve()))

    def load(self, seed: int) -> BenchmarkData:
        """Read the queries.

        Raises:
            ConfigError: more tasks than intents.
            DataError: files that are not the authors'.
        """
        train, test = self._read("train"), self._read("test")
        classes = check_classes(train, test, self.folder)
        if len(classes) != NUM_CLASSES:
            raise DataError(f"{self.folder}: {len(classes)} intents, {NUM_CLASSES} are expected")
        return self.assembled("banking77", classes, train, test, LICENCE, seed)

    def _read(self, split: str) -> list[Row]:
        path = Path(self.folder) / f"{split}.csv"
        rows = read_rows(path, "text", "category")
        if len(rows) != COUNTS[split]:
            raise DataError(
                f"{path}: {COUNTS[split]:,} queries are expected, found {len(rows):,}; take the file of "
                "github.com/PolyAI-LDN/task-specific-datasets (banking_data/)"
            )
        return rows
