"""What a benchmark is: images decoded once, or texts; classes with names, a split, a class order, a licence.

A benchmark plug-in is one file with one frozen dataclass, registered by name, whose fields are its
parameters and whose ``load(seed)`` returns the data:

    @benchmarks.register("digits")
    @dataclass(frozen=True, kw_only=True)
    class Digits(BenchmarkConfig): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from cl_adapters.config import check_range
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.registry import Registry

UInt8Images = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]


LARGEST_SCALE = 100
"""Times the size of an image, as which augmentation may show it."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Training-time augmentation, applied before the backbone's own resize and normalisation.

    Attributes:
        kind: "crop" (RandomResizedCrop), "affine" (small rotation, shift, scale) or "none".
        scale: area range of "crop"; size factor range of "affine".
        flip: horizontal flip with probability one half. Wrong for characters.
        degrees: rotation range of "affine", in degrees each way.
        translate: largest shift of "affine" as a fraction of the image side.
    """

    kind: str = "crop"
    scale: tuple[float, float] = (0.05, 1.0)
    flip: bool = True
    degrees: float = 10.0
    translate: float = 0.08

    def __post_init__(self) -> None:
        if self.kind not in ("crop", "affine", "none"):
            raise ValueError(f"augmentation kind must be 'crop', 'affine' or 'none', not {self.kind!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= LARGEST_SCALE:
            raise ValueError(f"scale must be two ascending numbers in (0, {LARGEST_SCALE}], got {list(self.scale)}")
        check_range(self, "[0, 360]", "degrees")
        check_range(self, "[0, 1]", "translate")


CHARACTERS = Augmentation(kind="affine", scale=(0.9, 1.1), flip=False)
"""For images of characters: many a mirrored one is another, or none."""


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with labels.

    Attributes:
        images: N arrays uint8 [H, W, 3] (one array [N, H, W, 3] when all sizes agree).
        labels: int64 [N], indices into ``BenchmarkData.classes``.
        names: N short names for messages ("train/cat/3.png"), or empty.
    """

    modality: ClassVar[str] = "image"

    images: UInt8Images
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")
        _check_labels(self.labels, self.names)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextSet:
    """Texts with labels.

    Attributes:
        texts: N strings.
        labels: int64 [N], indices into ``BenchmarkData.classes``.
        names: N short names for messages ("intents.csv:17"), or empty.
    """

    modality: ClassVar[str] = "text"

    texts: Sequence[str]
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise DataError(f"{len(self.texts)} texts but {len(self.labels)} labels")
        _check_labels(self.labels, self.names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> UInt8Images:
        """None: texts have no images.

        Raises:
            DataError: always.
        """
        raise DataError("these samples are texts, which have no images")


def _check_labels(labels: npt.ArrayLike, names: Sequence[str]) -> None:
    """Check that labels are places of classes.

    Raises:
        DataError: names the first sample whose label is none.
    """
    values = np.asarray(labels)
    if not values.size:
        return
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise DataError(f"labels are whole numbers, int64 [N], got {values.dtype} {list(values.shape)}: {values[:3]!r}")
    wrong = np.flatnonzero(values < 0)
    if len(wrong):
        place = int(wrong[0])
        named = f" ({names[place]})" if place < len(names) else ""
        raise DataError(f"sample {place}{named} has label {values[place]}; labels count from 0")


SampleSet: TypeAlias = ImageSet | TextSet


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """A loaded benchmark, ready to be turned into Avalanche streams.

    Attributes:
        classes: class names; position = label.
        class_order: labels in the order in which they arrive.
        task_sizes: number of new classes of each task; sums to ``len(classes)``.
        licence: licence and source of the samples, one line.
        train, test: the samples, both images or both texts.
        augmentation: training-time augmentation of images.
    """

    name: str
    classes: tuple[str, ...]
    class_order: tuple[int, ...]
    task_sizes: tuple[int, ...]
    licence: str
    train: SampleSet
    test: SampleSet
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if sorted(self.class_order) != list(range(len(self.classes))):
            raise DataError(f"{self.name}: class_order is not a permutation of 0..{len(self.classes) - 1}")
        if sum(self.task_sizes) != len(self.classes) or min(self.task_sizes, default=0) < 1:
            raise DataError(f"{self.name}: task sizes {self.task_sizes} do not split {len(self.classes)} classes")
        if self.train.modality != self.test.modality:
            raise DataError(f"{self.name}: {self.train.modality}s to train on, but {self.test.modality}s to test")
        for split, part in (("train", self.train), ("test", self.test)):
            highest = int(np.max(part.labels, initial=0))
            if highest >= len(self.classes):
                raise DataError(
                    f"{self.name}: a {split} {self.modality} has label {highest}, but there are only "
                    f"{len(self.classes)} classes, labelled from 0"
                )
            counts = np.bincount(part.labels, minlength=len(self.classes))
            empty = [self.classes[label] for label in np.flatnonzero(counts == 0)]
            if empty:
                raise DataError(f"{self.name}: no {split} {self.modality} of class {', '.join(empty[:5])}")

    @property
    def modality(self) -> str:
        """What a sample is: "image" or "text"."""
        return self.train.modality

    @property
    def tasks(self) -> tuple[tuple[int, ...], ...]:
        """Labels of each task, in arrival order."""
        cuts = np.cumsum((0, *self.task_sizes))
        return tuple(self.class_order[a:b] for a, b in pairwise(cuts))


class BenchmarkConfig(ABC):
    """Base of the benchmark plug-ins: frozen dataclasses of parameters.

    Attributes:
        argument: name of the field that ``NAME:ARGUMENT`` sets on the command line, if any.
        summary: one line for ``cl-adapters list benchmarks``.
    """

    argument: ClassVar[str | None] = None
    summary: ClassVar[str] = ""

    @abstractmethod
    def load(self, seed: int) -> BenchmarkData:
        """Return the data; the same ``seed`` and parameters give the same bytes.

        Args:
            seed: of the class order (where the benchmark has no fixed one) and of made-up images.
        """


benchmarks: Registry[type[BenchmarkConfig]] = Registry(
    "benchmark", "cl_adapters.benchmarks.data", group="cl_adapters.benchmarks.data"
)


def arrival_order(num_classes: int, seed: int | None) -> tuple[int, ...]:
    """Class order of the class-incremental literature: ``RandomState(seed).permutation``.

    ``seed=1993`` gives the order of MOS, SEMA and PILOT (algorithms: data_manager.py); None the natural order.

    Raises:
        ConfigError: the seed is not one that ``RandomState`` takes.
    """
    if seed is None:
        return tuple(range(num_classes))
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the seed of the class order must lie between 0 and 2**32 - 1, got {seed}")
    return tuple(int(label) for label in np.random.RandomState(seed).permutation(num_classes))


def split_evenly(num_classes: int, tasks: int) -> tuple[int, ...]:
    """Task sizes for ``tasks`` tasks; the first ones take one class more where it does not divide.

    Raises:
        ConfigError: more tasks than classes, or fewer than one task.
    """
    if not 1 <= tasks <= num_classes:
        raise ConfigError(f"tasks must be between 1 and the number of classes {num_classes}, got {tasks}")
    base, extra = divmod(num_classes, tasks)
    return tuple(base + (i < extra) for i in range(tasks))
