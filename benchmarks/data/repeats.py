"""``repeats``: new characters in every task, but textures that recur; nothing downloaded.

Task t shows characters that no task showed before, under the texture of look t modulo D: the first D tasks bring a
look that is new, all later ones one that was there before. A method that grows only for what it has not met should
grow in the first D tasks and then stop.
"""

from __future__ import annotations

from collections.abc import Callable
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
)
from cl_adapters.benchmarks.data.glyphs import LICENCE, class_name
from cl_adapters.benchmarks.glyphs.classes import glyph_classes
from cl_adapters.benchmarks.glyphs.render import TEST_FACES, TRAIN_FACES, Style, render
from cl_adapters.config import check_range
from cl_adapters.errors import ConfigError

UInt8Image = npt.NDArray[np.uint8]


def _style(*, dark_ink: float, contrast: float = 180.0, noise: tuple[float, float] = (0.0, 6.0)) -> Style:
    """Characters that differ less than those of ``glyphs``: what changes here is what lies over them."""
    return Style(
        degrees=10.0,
        scale=(0.75, 1.1),
        shear=0.2,
        shift=0.08,
        thickness=(-0.5, 0.5),
        contrast=(contrast, 255.0),
        dark_ink=dark_ink,
        tint=8.0,
        gradient=10.0,
        noise=noise,
    )


def _squared(image: UInt8Image) -> UInt8Image:
    """Dark lines across and down, eight to the side."""
    y, x = np.indices(image.shape[:2]) % _period(image, 8)
    return np.where(((y == 0) | (x == 0))[..., None], image // 4, image)


def _striped(image: UInt8Image) -> UInt8Image:
    """Shaded diagonal stripes, about five to the side."""
    period = _period(image, 5)
    y, x = np.indices(image.shape[:2])
    shaded = np.less((x + y) % period, period / 2)
    return np.where(shaded[..., None], image // 2, image)


def _dotted(image: UInt8Image) -> UInt8Image:
    """Seen through a mask with eight by eight holes."""
    period = _period(image, 8)
    y, x = np.indices(image.shape[:2]) % period - (period - 1) / 2
    return np.where((x**2 + y**2 < period**2 / 8)[..., None], image, image // 8)


def _chequered(image: UInt8Image) -> UInt8Image:
    """Negative in every other field of a board of about five by five."""
    y, x = np.indices(image.shape[:2]) // _period(image, 5)
    return np.where(((x + y) % 2 == 0)[..., None], 255 - image, image)


def _plain(image: UInt8Image) -> UInt8Image:
    """As it was drawn."""
    return image


def _period(image: UInt8Image, times: int) -> int:
    side: int = image.shape[0]
    return max(3, round(side / times))


@dataclass(frozen=True)
class Look:
    """What all images of a task have in common, whatever they show.

    Attributes:
        name: stands in the names of classes and images.
        style: how the characters are drawn.
        texture: image uint8 [H, H, 3] to the same under a texture; its periods are fractions of the side.
    """

    name: str
    style: Style
    texture: Callable[[UInt8Image], UInt8Image]


LOOKS = (
    Look("squared", _style(dark_ink=1.0), _squared),
    Look("striped", _style(dark_ink=1.0), _striped),
    Look("dotted", _style(dark_ink=0.0), _dotted),
    Look("chequered", _style(dark_ink=0.0), _chequered),
    Look("noisy", _style(dark_ink=0.5, contrast=150.0, noise=(60.0, 80.0)), _plain),
)
"""In order of first appearance. Each moves the embedded backbone's features much further than new characters do."""


@benchmarks.register("repeats")
@dataclass(frozen=True, kw_only=True)
class Repeats(BenchmarkConfig):
    """Characters under a few textures that come back; training and test images come from different faces.

    Attributes:
        tasks: number of tasks.
        classes_per_task: new characters in each of them.
        looks: D, how many looks the tasks go through before the first comes back.
        train_per_class, test_per_class: images of each class.
        size: side of the images in pixels.
        order_seed: seed of the class order; None takes the seed of the run.
        image_seed: seed of the images; None takes the seed of the run.
        augmentation: training-time augmentation. Flips are off: many a mirrored character is another one.
    """

    summary: ClassVar[str] = "rendered characters, new ones in every task, under a few textures that come back"

    tasks: int = 12
    classes_per_task: int = 4
    looks: int = 4
    train_per_class: int = 30
    test_per_class: int = 10
    size: int = 32
    order_seed: int | None = None
    image_seed: int | None = None
    augmentation: Augmentation = CHARACTERS

    def __post_init__(self) -> None:
        for name in ("classes_per_task", "train_per_class", "test_per_class"):
            if getattr(self, name) < 1:
                raise ConfigError(f"repeats: {name} must be at least 1, got {getattr(self, name)}")
        if self.size < 16:
            raise ConfigError(f"repeats: size must be at least 16 pixels, or textures blur, got {self.size}")
        check_range(self, "[1, 1024]", "size")
        check_range(self, "[1, 100000]", "train_per_class", "test_per_class")
        if not 1 <= self.looks <= len(LOOKS):
            raise ConfigError(f"repeats: looks must be between 1 and {len(LOOKS)}, got {self.looks}")

    def look_of(self, task: int) -> Look:
        """The look of a task (0-based)."""
        return LOOKS[task % self.looks]

    def load(self, seed: int) -> BenchmarkData:
        """Render the images; ``seed`` is used where ``image_seed`` and ``order_seed`` are None.

        Raises:
            ConfigError: more classes than there are characters, or a negative seed.
        """
        image_seed = seed if self.image_seed is None else self.image_seed
        if image_seed < 0:
            raise ConfigError(f"repeats: the seed of the images must not be negative, got {image_seed}")
        most = len(glyph_classes("benchmark")) // self.classes_per_task
        if not 1 <= self.tasks <= most:
            raise ConfigError(
                f"repeats: tasks must be between 1 and {most} with {self.classes_per_task} new characters each, "
                f"got {self.tasks}"
            )
        count = self.tasks * self.classes_per_task
        codepoints = glyph_classes("benchmark")[:count]
        order = arrival_order(count, seed if self.order_seed is None else self.order_seed)
        looks = {label: self.look_of(place // self.classes_per_task) for place, label in enumerate(order)}
        pairs = [(point, looks[label]) for label, point in enumerate(codepoints)]
        return BenchmarkData(
            name="repeats",
            classes=tuple(f"{class_name(point)}, {look.name}" for point, look in pairs),
            class_order=order,
            task_sizes=(self.classes_per_task,) * self.tasks,
            licence=LICENCE,
            train=self._draw(pairs, "train", TRAIN_FACES, self.train_per_class, image_seed),
            test=self._draw(pairs, "test", TEST_FACES, self.test_per_class, image_seed),
            augmentation=self.augmentation,
        )

    def _draw(
        self, pairs: list[tuple[int, Look]], split: str, faces: tuple[str, ...], per_class: int, seed: int
    ) -> ImageSet:
        images = np.empty((len(pairs) * per_class, self.size, self.size, 3), dtype=np.uint8)
        names = []
        for row in range(len(images)):
            (point, look), number = pairs[row // per_class], row % per_class
            rng = np.random.default_rng((seed, point, int(split == "test"), number))
            face = faces[number % len(faces)]
            images[row] = look.texture(render(point, face, rng, self.size, look.style))
            names.append(f"repeats/{split}/{look.name}/U+{point:04X}/{number:03d}-{face}")
        return ImageSet(images, np.repeat(np.arange(len(pairs), dtype=np.int64), per_class), names)
