"""``hf``: a text data set of the Hugging Face hub, through the ``datasets`` library; needs the network or its cache."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

from cl_adapters.benchmarks.base import BenchmarkData, benchmarks
from cl_adapters.benchmarks.data._text_benchmark import TextBenchmarkConfig, check_classes, hold_out
from cl_adapters.benchmarks.data._text_files import Row
from cl_adapters.errors import ConfigError, DataError


@benchmarks.register("hf")
@dataclass(frozen=True, kw_only=True)
class HuggingFace(TextBenchmarkConfig):
    """A labelled text data set of the Hugging Face hub. No code of the data set is run.

    Attributes:
        dataset: its name on the hub, for instance ``mteb/banking77``.
        config: which of its configurations; None for the only one.
        revision: commit or tag; None for the newest, which may change between runs.
        text_column: name of the column of texts.
        label_column: name of the column of classes; where that is a ClassLabel its names are used.
        train_split: split to train on.
        test_split: split to test on; None holds out ``test_share`` of each class of the training split.
        test_share: see there.
    """

    argument: ClassVar[str | None] = "dataset"
    summary: ClassVar[str] = "a labelled text data set of the Hugging Face hub (datasets library, network)"

    dataset: str
    config: str | None = None
    revision: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str | None = "test"
    test_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.test_share < 1:
            raise ConfigError(f"test_share must lie between 0 and 1, got {self.test_share}")

    def load(self, seed: int) -> BenchmarkData:
        """Load the splits, which never follow ``seed``; downloads them where they are not in the library's cache.

        Raises:
            ConfigError: more tasks than classes.
            DataError: no library, no network, no such data set, or one that cannot be used.
        """
        train, licence = self._read(self.train_split)
        if self.test_split is None:
            train, test = hold_out(train, self.test_share)
        else:
            test = self._read(self.test_split)[0]
        return self.assembled("hf", check_classes(train, test, self.dataset), train, test, licence, seed)

    def _read(self, split: str) -> tuple[list[Row], str]:
        """The rows of one split, and a line on the licence."""
        try:
            library: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(
                "benchmark 'hf' needs the package datasets: pip install datasets, or save the data set as a table and "
                "use text:FILE"
            ) from error
        try:
            table = library.load_dataset(self.dataset, self.config, split=split, revision=self.revision)
        except Exception as error:  # the library lets through whatever hub, network and file formats raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(
                f"data set {self.dataset!r}, split {split!r}, cannot be had here: {reason}. Check name, config and "
                "split; without a network, load it once where there is one and copy the library's cache"
            ) from error
        for column in (self.text_column, self.label_column):
            if column not in table.column_names:
                raise DataError(
                    f"data set {self.dataset!r} has no column {column!r}; it has {', '.join(table.column_names)}. Name "
                    "the columns with text_column and label_column"
                )
        names = getattr(table.features[self.label_column], "names", None)
        rows = [
            self._row(text, label, names, f"{self.dataset}/{split}[{place}]")
            for place, (text, label) in enumerate(zip(table[self.text_column], table[self.label_column], strict=True))
        ]
        if not rows:
            raise DataError(f"data set {self.dataset!r}: split {split!r} has no rows")
        stated = getattr(getattr(table, "info", None), "license", "") or "not stated"
        return rows, f"licence {' '.join(str(stated).split())} (Hugging Face data set {self.dataset})"

    def _row(self, text: Any, label: Any, names: list[str] | None, place: str) -> Row:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: {self.text_column!r} must be a text that is not empty, got {text!r}")
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise DataError(f"{place}: {self.label_column!r} must be a class name or number, got {label!r}")
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise DataError(f"{place}: {self.label_column!r} is {label}, which is no class (0 to {len(names) - 1})")
            return Row(text=text, label=names[label], split=None, place=place)
        return Row(text=text, label=str(label), split=None, place=place)
