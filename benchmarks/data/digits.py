"""``digits``: the 1,797 real handwritten digits that scikit-learn carries. No download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cl_adapters.benchmarks.base import (
    CHARACTERS,
    Augmentation,
    BenchmarkConfig,
    BenchmarkData,
    ImageSet,
    arrival_order,
    benchmarks,
    split_evenly,
)
from cl_adapters.errors import DataError

NUM_IMAGES = 1797
NUM_CLASSES = 10
TEST_FRACTION = 0.25
SPLIT_SEED = 20240601
"""The split is part of the benchmark, so it does not follow the seed of the run."""


@benchmarks.register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(BenchmarkConfig):
    """Handwritten digits, 8 x 8 grey, bright ink on black; a quarter of each class is the test set.

    Attributes:
        tasks: number of tasks that the 10 classes are dealt into.
        order_seed: seed of the class order; None takes the seed of the run.
        augmentation: training-time augmentation. Flips are off: a mirrored digit is none.
    """

    summary: ClassVar[str] = "1,797 real handwritten digits (8x8), 10 classes; comes with scikit-learn"

    tasks: int = 5
    order_seed: int | None = None
    augmentation: Augmentation = CHARACTERS

    def load(self, seed: int) -> BenchmarkData:
        """Return the digits; ``seed`` only sets the class order, never the split.

        Raises:
            ConfigError: more tasks than classes.
            DataError: the installed scikit-learn does not carry the expected 1,797 images.
        """
        images, labels = _read()
        is_test = _test_mask(labels)
        return BenchmarkData(
            name="digits",
            classes=tuple(str(digit) for digit in range(NUM_CLASSES)),
            class_order=arrival_order(NUM_CLASSES, seed if self.order_seed is None else self.order_seed),
            task_sizes=split_evenly(NUM_CLASSES, self.tasks),
            licence="CC BY 4.0 (UCI repository: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak "
            "1998); its test set, as copied by scikit-learn (load_digits)",
            train=_part(images, labels, ~is_test),
            test=_part(images, labels, is_test),
            augmentation=self.augmentation,
        )


def _test_mask(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mark the test images, bool [N]: the rounded ``TEST_FRACTION`` of every class."""
    rng = np.random.default_rng(SPLIT_SEED)
    is_test = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(TEST_FRACTION * len(members))]] = True
    return is_test


def _read() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    # Imported here because it takes a second, and the registry imports every benchmark to list their names.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey, labels = np.asarray(bunch.images), np.asarray(bunch.target, dtype=np.int64)
    if grey.shape != (NUM_IMAGES, 8, 8) or len(np.unique(labels)) != NUM_CLASSES:
        raise DataError(
            f"digits: expected {NUM_IMAGES} images of 8x8 in {NUM_CLASSES} classes, but this scikit-learn has "
            f"{grey.shape} in {len(np.unique(labels))}; install a version between 1.2 and 1.9"
        )
    levels = np.rint(grey * (255 / 16)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=-1), labels


def _part(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> ImageSet:
    names = [f"digits/{labels[row]}/{row:04d}" for row in np.flatnonzero(chosen)]
    return ImageSet(images[chosen], labels[chosen], names)
