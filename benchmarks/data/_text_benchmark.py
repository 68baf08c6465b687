"""What the benchmarks of texts share: class order, tasks, limits per class, and splits that are drawn here."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_adapters.benchmarks.base import BenchmarkConfig, BenchmarkData, TextSet, arrival_order, split_evenly
from cl_adapters.benchmarks.data._text_files import Row
from cl_adapters.errors import ConfigError, DataError

SPLIT_SEED = 20240601
"""The split is part of the benchmark, so it does not follow the seed of the run."""


@dataclass(frozen=True, kw_only=True)
class TextBenchmarkConfig(BenchmarkConfig):
    """Parameters of every benchmark of texts.

    Attributes:
        tasks: number of tasks that the classes are dealt into.
        train_per_class: keep only the first so many training texts of each class; None for all.
        test_per_class: the same for test.
        shuffle: false lets the classes arrive in the order of their names.
        order_seed: seed of the class order (1993: that of the literature); None takes the seed of the run.
    """

    tasks: int = 5
    train_per_class: int | None = None
    test_per_class: int | None = None
    shuffle: bool = True
    order_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_per_class", "test_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 (or null for all), got {value}")
        if not self.shuffle and self.order_seed is not None:
            raise ConfigError(
                f"order_seed={self.order_seed} is of no use with shuffle=false, which takes the order of the class "
                "names; leave one of them out"
            )

    def drawn(self, seed: int) -> int | None:
        """Seed of the class order, or None for the order of the names."""
        return (seed if self.order_seed is None else self.order_seed) if self.shuffle else None

    def assembled(
        self, name: str, classes: Sequence[str], train: Sequence[Row], test: Sequence[Row], licence: str, seed: int
    ) -> BenchmarkData:
        """The benchmark of these texts, its classes (position = label) dealt evenly into the tasks.

        Raises:
            ConfigError: more tasks than classes.
            DataError: a class without texts.
        """
        return BenchmarkData(
            name=name,
            classes=tuple(classes),
            class_order=arrival_order(len(classes), self.drawn(seed)),
            task_sizes=split_evenly(len(classes), self.tasks),
            licence=licence,
            train=text_set(train, classes, self.train_per_class),
            test=text_set(test, classes, self.test_per_class),
        )


def text_set(rows: Sequence[Row], classes: Sequence[str], limit: int | None = None) -> TextSet:
    """The first ``limit`` texts (None: all) of each class, in the order given."""
    label_of = {name: label for label, name in enumerate(classes)}
    taken: dict[str, int] = defaultdict(int)
    kept = []
    for row in rows:
        if limit is None or taken[row.label] < limit:
            taken[row.label] += 1
            kept.append(row)
    labels = np.array([label_of[row.label] for row in kept], dtype=np.int64)
    return TextSet([row.text for row in kept], labels, [row.place for row in kept])


def hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Split each class into texts to train on and texts to test on.

    Each class has a draw of its own, so that adding a class never moves a text of another, and texts that are
    the same letter for letter go to the same side. ``share`` counts different texts; at least one is held out.

    Raises:
        DataError: a class with fewer than two different texts.
    """
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row.label, []).append(row.text)
    held: set[tuple[str, str]] = set()
    for label, members in texts.items():
        distinct = list(dict.fromkeys(members))
        if len(distinct) < 2:
            raise DataError(
                f"class {label!r} has a single text ({distinct[0][:60]!r}), but one to train and one to test are "
                "needed; add texts, remove the class, or provide a test file"
            )
        count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
        rng = np.random.default_rng([SPLIT_SEED, zlib.crc32(label.encode("utf-8", "surrogateescape"))])
        held |= {(label, distinct[place]) for place in rng.permutation(len(distinct))[:count].tolist()}
    train = [row for row in rows if (row.label, row.text) not in held]
    return train, [row for row in rows if (row.label, row.text) in held]


def check_classes(train: Sequence[Row], test: Sequence[Row], where: str) -> list[str]:
    """The class names of both splits, sorted; where all are whole numbers, by their value.

    Raises:
        DataError: a class of one split only.
    """
    names = {row.label for row in train}, {row.label for row in test}
    for here, there, lonely in (("train", "test", names[0] - names[1]), ("test", "train", names[1] - names[0])):
        if lonely:
            shown = ", ".join(map(repr, sorted(lonely)[:10])) + (" and more" if len(lonely) > 10 else "")
            raise DataError(f"{where}: classes with {here} texts but no {there} texts: {shown}; every class needs both")
    numbers = all(name.isascii() and name.isdecimal() for name in names[0])
    return sorted(names[0], key=lambda name: (int(name), name) if numbers else (0, name))
