"""Against figures measured elsewhere on the same images: CIFAR-100 subset, DeiT-tiny (needs the reference assets)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from cl_adapters.benchmarks.run.experiment import Experiment, resolve
from cl_adapters.benchmarks.run.runner import run
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.ridge import Ridge
from cl_adapters.strategies import ranpac


def experiment_on(strategy: str, assets: Path, folder: Path, **options: object) -> Experiment:
    """DeiT-tiny, 112 px, 10 tasks of 10 classes, 50 training and 10 test images each, unpacked in ``folder``."""
    with zipfile.ZipFile(assets / "images" / "cifar100_subset.zip") as archive:
        archive.extractall(folder / "cifar")
    return resolve(
        strategy,
        f"folder:{folder / 'cifar'}",
        backbone="timm:deit_tiny_patch16_224",
        weights=str(assets / "weights" / "deit_tiny_patch16_224.in1k.safetensors"),
        settings={
            "img_size": 112,
            "crop_pct": 0.875,
            "benchmark.tasks": 10,
            "benchmark.max_train_per_class": 50,
            "benchmark.max_test_per_class": 10,
            "benchmark.order_seed": 1993,
            **options,
        },
    )


@pytest.mark.slow
@pytest.mark.assets
def test_prototypes_of_the_frozen_backbone_give_the_reference_curve(assets: Path, tmp_path: Path) -> None:
    """Nearest class mean of DeiT-tiny at 112 px, 10 tasks of 10: no training, so the curve must agree to a rounding.

    Origin: cosine nearest class mean computed independently of this package on the first 50 training and 10 test
    images of each class, class order RandomState(1993).permutation.
    """
    results = run(experiment_on("simple_cil", assets, tmp_path), tmp_path / "run")
    reference = [67.0, 49.0, 45.33, 44.75, 41.6, 40.67, 39.86, 37.87, 36.78, 36.5]
    assert results.a_curve == pytest.approx(reference, abs=0.11)  # one image of the first task is 1 %, of all 0.1 %
    assert results.a_bar == pytest.approx(43.94, abs=0.02)


@pytest.mark.slow
@pytest.mark.assets
def test_ridge_on_random_projections_gives_the_reference_curve(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RanPAC without adapter, M = 2,000: the strength is chosen as 1e5 at every task, and the curve agrees.

    Origin: projection of ``torch.Generator().manual_seed(0)`` and a fixed ridge of 1e5, computed independently of this
    package on the same images. The draw matters: over 12 of them A-bar is 51.5 +- 0.75 (50.35 to 52.82, which is this
    one), so the test takes the same.
    """

    def same_draw(width: int, projection: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(width, projection, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(ranpac, "random_projection", same_draw)
    experiment = experiment_on("ranpac", assets, tmp_path, train_adapter=False, projection=2000)
    results = run(experiment, tmp_path / "run")
    reference = [81.0, 59.0, 56.67, 53.5, 48.8, 48.33, 48.29, 45.63, 44.89, 42.1]
    assert results.a_curve == pytest.approx(reference, abs=0.11)
    assert results.a_bar == pytest.approx(52.82, abs=0.05)
    model = AdapterModel.load(tmp_path / "run" / "tasks" / "009" / "model")
    assert model.part("ridge", Ridge).ridges == [1e5] * 10
