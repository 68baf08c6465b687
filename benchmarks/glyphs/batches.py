"""Training images for ``vit_glyph_tiny``: rendered characters, bent and coarsened, from easy to hard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.benchmarks.glyphs.classes import glyph_classes
from cl_adapters.benchmarks.glyphs.render import CM_FACES, STIX_FACES, TRAIN_FACES, Style, coverage, render

IMG_SIZE = 32
STYLE = Style(
    degrees=20.0,
    scale=(0.7, 1.25),
    stretch=0.35,
    shear=0.4,
    shift=0.12,
    thickness=(-1.0, 1.0),
    contrast=(50.0, 255.0),
    noise=(0.0, 25.0),
)
"""Wider than the benchmark's, because the features are to serve handwriting too."""
EASY = Style(
    degrees=5.0,
    scale=(0.9, 1.1),
    stretch=0.1,
    shear=0.1,
    shift=0.04,
    thickness=(-0.2, 0.4),
    contrast=(200.0, 255.0),
    dark_ink=0.0,
    tint=5.0,
    gradient=5.0,
    noise=(0.0, 5.0),
)
"""Where the curriculum starts: on the full range from the first step, the loss stays at chance for very long."""


def faces_of(codepoint: int) -> tuple[str, ...]:
    """Return the faces in which pre-training sees a character: never those kept for the benchmark's test."""
    # The cmaps of Computer Modern are TeX's own outside ASCII.
    faces = (*TRAIN_FACES, *STIX_FACES, *(CM_FACES if codepoint < 128 else ()))
    return tuple(face for face in faces if codepoint in coverage(face))


def training_classes(min_faces: int) -> tuple[int, ...]:
    """Return the code points of the pre-training part that at least ``min_faces`` of ``TRAIN_FACES`` cover."""
    return tuple(p for p in glyph_classes("pretraining") if sum(p in coverage(f) for f in TRAIN_FACES) >= min_faces)


def draw_batch(
    codepoints: tuple[int, ...], size: int, seed: tuple[int, ...], hardness: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw ``size`` random training images, from ``EASY`` ones (``hardness`` 0) to the full ``STYLE`` (1).

    Returns:
        images float32 [size, 3, 32, 32] in 0..1, labels int64 [size].
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(codepoints), size=size)
    style = EASY.towards(STYLE, hardness)
    images = np.stack([_sample(codepoints[label], rng, style) for label in labels])
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return coarsen(bend(batch, generator, 0.12 * hardness), generator, 0.5 * hardness), torch.from_numpy(labels)


def _sample(codepoint: int, rng: np.random.Generator, style: Style) -> npt.NDArray[np.uint8]:
    faces = faces_of(codepoint)
    return render(codepoint, faces[rng.integers(len(faces))], rng, IMG_SIZE, style)


def bend(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Bend strokes as a hand would: a smooth random displacement, with a random strength for each image.

    Args:
        images: float32 [B, C, H, W].
        generator: the only source of randomness.
        strength: largest standard deviation of the displacement, half the image side being 1.
    """
    count, _, height, width = images.shape
    coarse = torch.randn(count, 2, 4, 4, generator=generator)
    amount = strength * torch.rand(count, 1, 1, 1, generator=generator)
    field = F.interpolate(coarse * amount, (height, width), mode="bicubic", align_corners=True)
    identity = torch.eye(2, 3).expand(count, 2, 3)
    grid = F.affine_grid(identity, [count, 1, height, width], align_corners=False) + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def coarsen(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Send some images through a lower resolution, 8 to 24 pixels, as small scans are.

    Args:
        images: float32 [B, C, H, W]; the first ``share`` is changed, in four groups of one resolution each.
        generator: the only source of randomness.
        share: 0 to 1.
    """
    changed = round(len(images) * share)
    groups = [group for group in images[:changed].chunk(4) if len(group)]
    for row, group in enumerate(groups):
        side = int(torch.randint(8, 25, (), generator=generator))
        small = F.interpolate(group, (side, side), mode="area")
        groups[row] = F.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([*groups, images[changed:]])
