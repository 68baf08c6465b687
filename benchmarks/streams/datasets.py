"""Plain torch data sets over decoded images and tokenised texts; usable without Avalanche."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cl_adapters.benchmarks.base import ImageSet, SampleSet
from cl_adapters.benchmarks.streams.tokenised import TokenSet
from cl_adapters.errors import DataError

Transform = Callable[[Any], Any]


class ImageDataset(Dataset[tuple[Any, int]]):
    """Some images of an ``ImageSet``, transformed one by one when they are asked for.

    Args:
        images: the decoded images, an ``ImageSet``.
        indices: positions to take, in this order; None takes all.
        transform: from an RGB Pillow image to a tensor (or anything); None gives the Pillow image.

    Attributes:
        targets: the labels, one Python int per item.
    """

    def __init__(
        self, images: SampleSet, indices: Sequence[int] | None = None, transform: Transform | None = None
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


class TextDataset(Dataset[tuple[Tensor, int]]):
    """Some texts of a ``TokenSet``, as token ids of one width N, that of its longest text: any loader can stack them.

    Args:
        texts: with their tokens.
        indices: positions to take, in this order; None takes all.

    Attributes:
        targets: the labels, one Python int per item.
        lengths: tokens per item.
    """

    def __init__(self, texts: TokenSet, indices: Sequence[int] | None = None) -> None:
        self.texts = texts
        self.indices = list(range(len(texts)) if indices is None else map(int, indices))
        self.targets: list[int] = [int(texts.labels[index]) for index in self.indices]
        lengths = texts.lengths
        self.lengths: list[int] = [int(lengths[index]) for index in self.indices]
        self.width = int(lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """Return (int64 [N], -1 behind the end of the text; label)."""
        return torch.from_numpy(self.texts.row(self.indices[position], self.width)), self.targets[position]


def as_dataset(
    samples: SampleSet, indices: Sequence[int] | None = None, transform: Transform | None = None
) -> ImageDataset | TextDataset:
    """An :class:`ImageDataset` or a :class:`TextDataset`.

    Raises:
        DataError: texts without tokens.
    """
    if isinstance(samples, ImageSet):
        return ImageDataset(samples, indices, transform)
    if not isinstance(samples, TokenSet):
        raise DataError("these texts have no tokens yet: use prepare(data, backbone) first")
    return TextDataset(samples, indices)


def task_indices(samples: SampleSet, labels: Sequence[int]) -> list[int]:
    """Return the positions of all samples with one of ``labels``, ascending."""
    return [int(index) for index in np.flatnonzero(np.isin(samples.labels, list(labels)))]
