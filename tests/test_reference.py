"""Against figures measured elsewhere on the same images: CIFAR-100 subset, DeiT-tiny (needs the reference assets)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cl_adapters.benchmarks.experiment import resolve
from cl_adapters.benchmarks.runner import run


@pytest.mark.slow
@pytest.mark.assets
def test_prototypes_of_the_frozen_backbone_give_the_reference_curve(assets: Path, tmp_path: Path) -> None:
    """Nearest class mean of DeiT-tiny at 112 px, 10 tasks of 10: no training, so the curve must agree to a rounding.

    Origin: cosine nearest class mean computed independently of this package on the first 50 training and 10 test
    images of each class, class order RandomState(1993).permutation.
    """
    with zipfile.ZipFile(assets / "images" / "cifar100_subset.zip") as archive:
        archive.extractall(tmp_path / "cifar")
    experiment = resolve(
        "simple_cil",
        f"folder:{tmp_path / 'cifar'}",
        backbone="timm:deit_tiny_patch16_224",
        weights=str(assets / "weights" / "deit_tiny_patch16_224.in1k.safetensors"),
        settings={
            "img_size": 112,
            "crop_pct": 0.875,
            "benchmark.tasks": 10,
            "benchmark.max_train_per_class": 50,
            "benchmark.max_test_per_class": 10,
            "benchmark.order_seed": 1993,
        },
    )
    results = run(experiment, tmp_path / "run")
    reference = [67.0, 49.0, 45.33, 44.75, 41.6, 40.67, 39.86, 37.87, 36.78, 36.5]
    assert results.a_curve == pytest.approx(reference, abs=0.11)  # one image of the first task is 1 %, of all 0.1 %
    assert results.a_bar == pytest.approx(43.94, abs=0.02)
