"""A plain torch data set over decoded images; usable without Avalanche."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cl_adapters.benchmarks.base import ImageSet

Transform = Callable[[Image.Image], Any]


class ImageDataset(Dataset[tuple[Any, int]]):
    """Some images of an ``ImageSet``, transformed one by one when they are asked for.

    Args:
        images: the decoded images.
        indices: positions to take, in this order; None takes all.
        transform: from an RGB Pillow image to a tensor (or anything); None gives the Pillow image.

    Attributes:
        targets: the labels, one Python int per item.
    """

    def __init__(
        self, images: ImageSet, indices: Sequence[int] | None = None, transform: Transform | None = None
    ) -> None:
        self.images = images
        self.indices = list(range(len(images)) if indices is None else map(int, indices))
        self.transform = transform
        self.targets: list[int] = [int(images.labels[index]) for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """Return (transformed image, label)."""
        image = Image.fromarray(np.asarray(self.images.images[self.indices[position]]))
        return (image if self.transform is None else self.transform(image)), self.targets[position]


def task_indices(images: ImageSet, labels: Sequence[int]) -> list[int]:
    """Return the positions of all images with one of ``labels``, ascending."""
    return [int(index) for index in np.flatnonzero(np.isin(images.labels, list(labels)))]
