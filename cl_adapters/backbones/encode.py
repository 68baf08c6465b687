"""Files and texts as inputs of a backbone, and as its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.config import counted
from cl_adapters.errors import ClAdaptersError
from cl_adapters.images import decode_image


def image_preprocessing(backbone: FrozenBackbone) -> Preprocessing:
    """How a backbone takes images.

    Raises:
        ClAdaptersError: it takes texts, or says nothing of its inputs.
    """
    found = backbone.preprocessing
    if isinstance(found, TextPreprocessing):
        raise ClAdaptersError(f"backbone {backbone.name!r} takes texts, not images: use predict_texts or --text")
    if found is None:
        raise ClAdaptersError(f"backbone {backbone.name!r} has no image preprocessing: call predict on prepared inputs")
    return found


def text_preprocessing(backbone: FrozenBackbone) -> TextPreprocessing:
    """How a backbone takes texts.

    Raises:
        ClAdaptersError: it takes images, or says nothing of its inputs.
    """
    found = backbone.preprocessing
    if isinstance(found, TextPreprocessing):
        return found
    if found is None:
        raise ClAdaptersError(f"backbone {backbone.name!r} has no tokenizer: call predict on token ids")
    raise ClAdaptersError(f"backbone {backbone.name!r} takes images, not texts: use predict_files, or give image files")


def image_inputs(backbone: FrozenBackbone, files: Sequence[str | Path]) -> Tensor:
    """Image files as a backbone takes them, float32 [B, C, H, W] on the CPU.

    Raises:
        ClAdaptersError: the backbone takes no images.
        DataError: a file that is no image.
    """
    transform = image_preprocessing(backbone).eval_transform()
    return torch.stack([transform(decode_image(Path(file))) for file in files])


def text_inputs(backbone: FrozenBackbone, texts: Sequence[str]) -> Tensor:
    """Texts as a backbone takes them, int64 [B, N] on the CPU.

    Raises:
        ClAdaptersError: the backbone takes no texts.
        DataError: something else than texts.
    """
    return text_preprocessing(backbone).encode(texts)


def encode(backbone: FrozenBackbone, inputs: Sequence[str] | Sequence[Path], batch: int | None = None) -> Tensor:
    """Features of texts (str) or image files (Path), ``batch`` at a time, without gradients.

    They are those under the bare backbone where no adapter is routed to.

    Returns:
        float32 [B, D] on the backbone's device.

    Raises:
        ClAdaptersError: the backbone takes no such inputs.
        ConfigError: ``batch`` is less than 1.
        DataError: a file that is no image, or something else than texts.
    """
    batch = None if batch is None else counted(batch, "batch")
    parts = [torch.empty(0, backbone.num_features, device=backbone.device)]
    with torch.no_grad():
        for start in range(0, len(inputs), batch or len(inputs) or 1):
            part: Any = inputs[start : start + batch] if batch else inputs
            x = (image_inputs if isinstance(part[0], Path) else text_inputs)(backbone, part)
            parts.append(backbone.features(x.to(backbone.device)))
    return torch.cat(parts)
