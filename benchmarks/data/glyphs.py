"""``glyphs``: rendered characters of many scripts, hundreds of classes, nothing downloaded.

Every image depends on the seed, its character and its number only: asking for more classes or more images leaves the
others as they were.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

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
from cl_adapters.benchmarks.glyphs.classes import glyph_classes
from cl_adapters.benchmarks.glyphs.render import TEST_FACES, TRAIN_FACES, Style, render
from cl_adapters.config import check_range
from cl_adapters.errors import ConfigError

LICENCE = (
    "rendered here from the DejaVu fonts that matplotlib ships (Bitstream Vera and Arev licences, changes in the "
    "public domain); the images are made on the fly and carry no licence of their own"
)

STYLE = Style(
    degrees=20.0,
    scale=(0.5, 1.1),
    stretch=0.3,
    shear=0.3,
    shift=0.15,
    thickness=(-0.9, 0.9),
    contrast=(50.0, 255.0),
    noise=(5.0, 30.0),
)
"""Partly beyond what the embedded backbone was trained on (smaller, noisier), so that methods can differ."""


@benchmarks.register("glyphs")
@dataclass(frozen=True, kw_only=True)
class Glyphs(BenchmarkConfig):
    """Characters of twelve font faces; training and test images come from different faces.

    Attributes:
        classes: how many characters; which ones never changes: the first n of one fixed list.
        tasks: number of tasks that the classes are dealt into.
        train_per_class, test_per_class: images of each class.
        size: side of the images in pixels.
        order_seed: seed of the class order; None takes the seed of the run.
        image_seed: seed of the images; None takes the seed of the run.
        style: how much the images of one character differ.
        augmentation: training-time augmentation. Flips are off: many a mirrored character is another one.
    """

    argument: ClassVar[str | None] = "classes"
    summary: ClassVar[str] = (
        "characters rendered from matplotlib's fonts, up to hundreds of classes; nothing to download"
    )

    classes: int = 100
    tasks: int = 10
    train_per_class: int = 50
    test_per_class: int = 10
    size: int = 32
    order_seed: int | None = None
    image_seed: int | None = None
    style: Style = STYLE
    augmentation: Augmentation = CHARACTERS

    def __post_init__(self) -> None:
        for name in ("classes", "tasks", "train_per_class", "test_per_class"):
            if getattr(self, name) < 1:
                raise ConfigError(f"glyphs: {name} must be at least 1, got {getattr(self, name)}")
        if self.size < 8:
            raise ConfigError(f"glyphs: size must be at least 8 pixels, got {self.size}")
        check_range(self, "[1, 1024]", "size")
        check_range(self, "[1, 100000]", "train_per_class", "test_per_class")
        if self.classes > (available := len(glyph_classes("benchmark"))):
            raise ConfigError(f"glyphs: {self.classes} classes asked for, but only {available} characters exist")

    def load(self, seed: int) -> BenchmarkData:
        """Render the images; ``seed`` is used where ``image_seed`` and ``order_seed`` are None.

        Raises:
            ConfigError: more tasks than classes, or a negative seed.
        """
        image_seed = seed if self.image_seed is None else self.image_seed
        if image_seed < 0:
            raise ConfigError(f"glyphs: the seed of the images must not be negative, got {image_seed}")
        task_sizes = split_evenly(self.classes, self.tasks)
        codepoints = glyph_classes("benchmark")[: self.classes]
        return BenchmarkData(
            name="glyphs",
            classes=tuple(class_name(point) for point in codepoints),
            class_order=arrival_order(self.classes, seed if self.order_seed is None else self.order_seed),
            task_sizes=task_sizes,
            licence=LICENCE,
            train=self._draw(codepoints, "train", TRAIN_FACES, self.train_per_class, image_seed),
            test=self._draw(codepoints, "test", TEST_FACES, self.test_per_class, image_seed),
            augmentation=self.augmentation,
        )

    def _draw(
        self, codepoints: Sequence[int], split: str, faces: tuple[str, ...], per_class: int, seed: int
    ) -> ImageSet:
        images = np.empty((len(codepoints) * per_class, self.size, self.size, 3), dtype=np.uint8)
        names = []
        for row in range(len(images)):
            point, number = codepoints[row // per_class], row % per_class
            rng = np.random.default_rng((seed, point, int(split == "test"), number))
            face = faces[number % len(faces)]
            images[row] = render(point, face, rng, self.size, self.style)
            names.append(f"glyphs/{split}/U+{point:04X}/{number:03d}-{face}")
        return ImageSet(images, np.repeat(np.arange(len(codepoints), dtype=np.int64), per_class), names)


def class_name(codepoint: int) -> str:
    """Return "U+00E9 LATIN SMALL LETTER E WITH ACUTE" and the like."""
    return f"U+{codepoint:04X} {unicodedata.name(chr(codepoint), 'UNNAMED')}"
