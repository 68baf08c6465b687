"""Fixtures for every test: one thread, small random backbones, the reference assets where there are any."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers on two cores, and figures that repeat
for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them in its workers: tables would wrap there and not elsewhere
    os.environ.pop(name, None)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of the reference weights and photographs; a test that asks for it is skipped where there is none."""
    named = os.environ.get("CL_ADAPTERS_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"needs the reference assets: no folder {folder}; set CL_ADAPTERS_ASSETS to it")
    return folder


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., torch.nn.Module]:
    """Factory of tiny timm VisionTransformers with random weights: ``tiny_vit(seed=0, width=32, depth=3, ...)``.

    Every weight is drawn from the seed (norms and biases too, so that no term vanishes by chance), none from the
    global generator. Input float32 [B, 3, img_size, img_size]; features float32 [B, width].
    """

    def build(
        seed: int = 0, *, width: int = 32, depth: int = 3, heads: int = 4, img_size: int = 32, patch_size: int = 8
    ) -> torch.nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the constructor draws too, and not all of it is overwritten below
            model: torch.nn.Module = VisionTransformer(
                img_size=img_size,
                patch_size=patch_size,
                embed_dim=width,
                depth=depth,
                num_heads=heads,
                num_classes=0,
            )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * (parameter[0].numel() ** -0.5))
                else:
                    parameter.add_(0.1 * noise)
        return model.eval()

    return build
