"""The architecture of ``vit_glyph_tiny``, with fresh weights, and what its images are mapped to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.benchmarks.glyphs.batches import IMG_SIZE

ARCHITECTURE: dict[str, Any] = {
    "img_size": IMG_SIZE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "num_classes": 0,
    "class_token": False,
    "global_pool": "avg",
}


def normalise(images: Tensor) -> Tensor:
    """Map 0..1 to -1..1, the preprocessing that goes with the weights."""
    return (images - 0.5) / 0.5


def build_encoder() -> nn.Module:
    """Return the encoder with fresh weights from torch's global generator."""
    from timm.models.vision_transformer import VisionTransformer

    encoder = VisionTransformer(**ARCHITECTURE)
    assert isinstance(encoder, nn.Module)
    assert encoder.pos_embed is not None
    with torch.no_grad():  # tokens know their neighbours from the first step on
        encoder.pos_embed.copy_(_sine_positions(IMG_SIZE // ARCHITECTURE["patch_size"], ARCHITECTURE["embed_dim"]))
    return encoder


def _sine_positions(side: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, float32 [1, side * side, width]."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    return 0.3 * torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]
