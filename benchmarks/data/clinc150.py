"""``clinc150``: 150 intents of spoken requests in 10 domains, and queries that belong to none of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from cl_adapters.benchmarks.base import BenchmarkData, arrival_order, benchmarks, split_evenly
from cl_adapters.benchmarks.data._text_benchmark import TextBenchmarkConfig
from cl_adapters.benchmarks.data._text_files import Row
from cl_adapters.errors import DataError

COUNTS = {"train": 15_000, "val": 3_000, "test": 4_500, "oos_train": 100, "oos_val": 100, "oos_test": 1_000}
NUM_CLASSES = 150
NUM_DOMAINS = 10
LICENCE = "CC BY 3.0 (Larson et al., EMNLP 2019: CLINC150; github.com/clinc/oos-eval)"


@benchmarks.register("clinc150")
@dataclass(frozen=True, kw_only=True)
class Clinc150(TextBenchmarkConfig):
    """CLINC150: 15,000 training and 4,500 test queries of 150 intents (Larson et al., EMNLP 2019).

    Attributes:
        folder: holds ``data_full.json`` (and ``domains.json``) of the authors.
        tasks: number of tasks; None: 15 of 10 intents, or with ``split="domains"`` one for each of the 10 domains.
        split: "classes" deals the intents into the tasks whatever their domain; "domains" deals whole domains (15
            intents each), so that every task brings a new subject.
    """

    argument: ClassVar[str | None] = "folder"
    summary: ClassVar[str] = "CLINC150: 150 intents in 10 domains, 15,000 + 4,500 queries (data_full.json)"

    folder: str
    tasks: int | None = None  # type: ignore[assignment]
    split: Literal["classes", "domains"] = "classes"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "folder", str(Path(self.folder).expanduser().resolve()))

    def load(self, seed: int) -> BenchmarkData:
        """Read the queries; validation and out-of-scope queries are left out.

        Raises:
            ConfigError: more tasks than intents, or than domains.
            DataError: files that are not the authors'.
        """
        rows = self._rows("train", "test")
        classes = sorted({row.label for row in rows["train"]})
        if len(classes) != NUM_CLASSES:
            raise DataError(f"{self.folder}: {len(classes)} intents, {NUM_CLASSES} are expected")
        train, test = rows["train"], rows["test"]
        if self.split == "classes":
            dealt = replace(self, tasks=15 if self.tasks is None else self.tasks)
            return dealt.assembled("clinc150", classes, train, test, LICENCE, seed)
        domains = self._domains(classes)
        sizes = split_evenly(len(domains), NUM_DOMAINS if self.tasks is None else self.tasks)
        data = replace(self, tasks=1).assembled("clinc150", classes, train, test, LICENCE, seed)
        names = sorted(domains)
        order = [names[place] for place in arrival_order(len(names), self.drawn(seed))]
        arrival = {label: place for place, label in enumerate(data.class_order)}
        labels = [sorted(map(classes.index, domains[name]), key=arrival.__getitem__) for name in order]
        starts = np.cumsum((0, *sizes))
        return replace(
            data,
            class_order=tuple(chain.from_iterable(labels)),
            task_sizes=tuple(sum(map(len, labels[a:b])) for a, b in pairwise(starts)),
        )

    def out_of_scope(self, split: Literal["train", "val", "test"] = "test") -> list[str]:
        """Queries of no intent: 100 to train on, 100 to choose thresholds by, 1,000 to test.

        Raises:
            DataError: files that are not the authors'.
        """
        key = f"oos_{split}"
        return [row.text for row in self._rows(key)[key]]

    def _rows(self, *wanted: str) -> dict[str, list[Row]]:
        content = _read_json(Path(self.folder) / "data_full.json")
        rows = {}
        for key in wanted:
            part = content.get(key)
            if not isinstance(part, list) or len(part) != COUNTS[key]:
                found = "nothing" if part is None else f"{len(part):,} queries"
                raise DataError(
                    f"{self.folder}/data_full.json: {COUNTS[key]:,} queries are expected in {key!r}, found {found}; "
                    "take the file of github.com/clinc/oos-eval"
                )
            rows[key] = list(_pairs(part, f"data_full.json:{key}"))
        return rows

    def _domains(self, classes: list[str]) -> dict[str, list[str]]:
        domains = _read_json(Path(self.folder) / "domains.json")
        intents = sorted(chain.from_iterable(domains.values()))
        if len(domains) != NUM_DOMAINS or intents != classes:
            raise DataError(f"{self.folder}/domains.json: expected {NUM_DOMAINS} domains that share out the intents")
        return domains


def _pairs(part: list[Any], where: str) -> Iterable[Row]:
    for place, pair in enumerate(part):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) and item for item in pair)):
            raise DataError(f"{where}[{place}]: expected [query, intent], got {pair!r}")
        yield Row(text=pair[0], label=pair[1], split=None, place=f"{where}[{place}]")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; it is a file of github.com/clinc/oos-eval (data/)"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object")
    return content
