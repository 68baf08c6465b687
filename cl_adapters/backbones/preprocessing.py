"""How a backbone wants its images: resolved from the model, recorded with everything trained on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

Transform: TypeAlias = Callable[[Any], Tensor]
"""From one decoded image (uint8 [H, W, 3] array or PIL image) to float32 [C, H, W]."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Image preprocessing.

    Attributes:
        input_size: (C, H, W) of the tensor that the backbone takes.
        mean: per channel, subtracted after scaling to [0, 1].
        std: per channel, divided by.
        interpolation: "bilinear", "bicubic", "nearest" or "lanczos".
        crop_pct: the image is resized so that its short side is H / crop_pct, then centre-cropped to H x W.
    """

    modality: ClassVar[str] = "image"
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        if self.input_size[0] not in (1, 3):
            raise ValueError(f"images of {self.input_size[0]} channels are not supported; 1 or 3 are")

    def tensor_steps(self) -> list[Any]:
        """The last steps of every transform: to [0, 1], then mean and standard deviation."""
        from torchvision import transforms

        return [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]

    def image_steps(self) -> list[Any]:
        """The first steps of every transform: array to PIL, colour mode."""
        from torchvision import transforms

        grey = [transforms.Grayscale(1)] if self.input_size[0] == 1 else []
        return [_ToPil(), *grey]

    def eval_transform(self) -> Transform:
        """Resize, centre crop, normalise: the same for evaluation, statistics and prediction."""
        from torchvision import transforms

        height, width = self.input_size[1:]
        short = round(min(height, width) / self.crop_pct)
        size: int | tuple[int, int] = short if height == width else (height, width)
        resize: Any = transforms.Resize(size, interpolation=transforms.InterpolationMode(self.interpolation))
        if height == width:
            resize = _ShortSide(resize, short, height, self.interpolation)
        transform: Transform = transforms.Compose(
            [*self.image_steps(), resize, transforms.CenterCrop((height, width)), *self.tensor_steps()]
        )
        return transform


LONG = 8
"""Images of which the long side is more than so many times the short one are not resized as a whole."""


class _ShortSide:
    """Resizes the short side of a PIL image, the other in proportion; of a very long image only what a crop will see.

    Otherwise an image of 1 x 400,000 pixels, a file of a kilobyte, would be resized to 256 x 102,400,000.

    Args:
        whole: resizes an image of ordinary proportions.
        short: the short side afterwards.
        crop: side of the square that is then cut from the middle, at most ``short``.
        interpolation: as of :class:`Preprocessing`.
    """

    def __init__(self, whole: Any, short: int, crop: int, interpolation: str) -> None:
        self.whole = whole
        self.short = short
        self.crop = crop
        self.interpolation = interpolation

    def __call__(self, image: Any) -> Any:
        from PIL import Image

        narrow, long = sorted(image.size)
        if long <= LONG * narrow:
            return self.whole(image)
        resized = self.short * long // narrow  # what the whole image's long side would be
        scale = long / resized
        first = round((resized - self.crop) / 2) * scale  # where the crop begins in the source
        margin = 3 * max(1.0, narrow / self.short) + 1  # half the width of the widest filter, Lanczos
        low, high = math.floor(first - margin), math.ceil(first + self.crop * scale + margin)
        low, high = max(0, low), min(long, high)
        part = first - low, first - low + self.crop * scale
        method = Image.Resampling[self.interpolation.upper()]
        if image.width == narrow:
            cut = image.crop((0, low, narrow, high))
            return cut.resize((self.short, self.crop), method, (0, part[0], narrow, part[1]))
        cut = image.crop((low, 0, high, narrow))
        return cut.resize((self.crop, self.short), method, (part[0], 0, part[1], narrow))


class _ToPil:
    """Array or PIL image to PIL image; a class, so that loader workers can receive it."""

    def __call__(self, image: Any) -> Any:
        from PIL import Image

        return image if isinstance(image, Image.Image) else Image.fromarray(image)
