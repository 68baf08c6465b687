"""Images that are very long: only the part that a centre crop sees is resized."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.images import decode_image

FILTERS = ("bilinear", "bicubic", "lanczos", "nearest")


def direct(preprocessing: Preprocessing) -> Any:
    """The transform that resizes the whole image."""
    side = preprocessing.input_size[1]
    method = InterpolationMode(preprocessing.interpolation)
    resize = transforms.Resize(round(side / preprocessing.crop_pct), interpolation=method)
    return transforms.Compose(
        [*preprocessing.image_steps(), resize, transforms.CenterCrop(side), *preprocessing.tensor_steps()]
    )


def waves(width: int, height: int) -> Image.Image:
    """Without edges, at which filters overshoot and are clipped."""
    x, y = np.arange(width), np.arange(height)[:, None]
    values = np.stack([128 + 60 * np.sin(0.41 * x + c) + 60 * np.cos(0.23 * y + c) for c in range(3)], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(40, 40), (33, 264), (264, 33), (7, 50), (1, 8), (500, 90), (1, 1)])
def test_ordinary_images_are_the_same_bit_for_bit(interpolation: str, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(input_size=(3, 32, 32), interpolation=interpolation)
    image = noise(*size)
    assert torch.equal(preprocessing.eval_transform()(image), direct(preprocessing)(image))


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(1, 9), (9, 1), (3, 1000), (1000, 3), (60, 541), (541, 60), (100, 3001), (2, 2001)])
def test_long_images_are_the_same_within_a_step_of_brightness(
    interpolation: str, size: tuple[int, int], crop_pct: float
) -> None:
    """But for edges, where it counts which side Pillow resizes first, and for nearest pixels.

    Pillow rounds and clips between the two sides, and chooses the order by the size of the image; and the nearest
    pixel may be the one beside it.
    """
    preprocessing = Preprocessing(input_size=(3, 32, 32), interpolation=interpolation, crop_pct=crop_pct)
    for image, most in ((waves(*size), 1.5), (noise(*size), 20)):
        far = (preprocessing.eval_transform()(image) - direct(preprocessing)(image)).abs() * 127.5
        assert far.shape == (3, 32, 32)
        assert (far > 1.5).float().mean() < 0.05
        assert interpolation == "nearest" or far.max() < most


def test_grey_backbones_and_loader_workers() -> None:
    preprocessing = Preprocessing(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    transform = pickle.loads(pickle.dumps(preprocessing.eval_transform()))
    far = (transform(noise(2, 300)) - direct(preprocessing)(noise(2, 300))).abs() * 127.5
    assert far.max() < 1.5


@pytest.mark.parametrize("size", [(1, 3_000_000), (400_000, 1)])
def test_a_line_of_pixels_takes_no_more_memory_than_itself(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes, which was resized to 256 x 768,000,000 pixels."""
    resize = Image.Image.resize

    def small(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        assert size[0] * size[1] < 1_000_000, size
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", small)
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(buffer, "PNG")
    made = Preprocessing().eval_transform()(decode_image(buffer.getvalue()))
    assert made.shape == (3, 224, 224)
    assert torch.equal(made.amin((1, 2)), torch.tensor([1.0, -1.0, -1.0]))
