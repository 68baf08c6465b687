"""The image preprocessing that goes with a vision model of transformers."""

from __future__ import annotations

from typing import Any

from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.errors import ConfigError

_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Names of Pillow's resampling filters."""


def preprocessing_of(processor: Any, side: int | None, other: bool = False) -> Preprocessing:
    """What an image processor does, as :class:`Preprocessing`.

    A processor that squeezes an image into a square is followed up to the shape of what it squeezes: here the short
    side is resized and the middle cropped, so that things keep their proportions.

    Args:
        processor: of transformers.
        side: the input side where the processor does not say it, or
        other: which is wanted instead of its own.

    Raises:
        ConfigError: neither says how large images are.
    """
    resized = _side(getattr(processor, "size", None))
    cropped = _side(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else None
    height = side if other else cropped or resized or side
    if height is None:
        raise ConfigError("neither the image processor nor the model says how large images are: pass img_size=...")
    crop_pct = min(1.0, cropped / resized) if cropped and resized else 1.0
    normalise = getattr(processor, "do_normalize", True)
    mean = tuple(map(float, processor.image_mean)) if normalise else (0.0, 0.0, 0.0)
    std = tuple(map(float, processor.image_std)) if normalise else (1.0, 1.0, 1.0)
    return Preprocessing(
        input_size=(len(mean), height, height),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATION.get(int(getattr(processor, "resample", 3)), "bicubic"),
        crop_pct=crop_pct,
    )


def _side(size: Any) -> int | None:
    """The short side that a size in any of the library's notations asks for."""
    if size is None or isinstance(size, int):
        return size
    named = dict(size) if isinstance(size, dict) else {key: getattr(size, key, None) for key in _KEYS}
    sides = (named.get(key) for key in _KEYS)
    return next((int(side) for side in sides if side), None)


_KEYS = ("shortest_edge", "height", "width")
