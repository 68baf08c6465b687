"""docs/add-a-strategy.md prints what is in the files, and APER answers by the formula of its paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cl_adapters.strategies
from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.parts.class_means import ClassMeans
from cl_adapters.predictors.concatenated import Concatenated


@pytest.mark.parametrize(
    ("language", "file"), [("python", "strategies/aper.py"), ("yaml", "benchmarks/configs/aper-digits.yaml")]
)
def test_the_page_prints_the_files(repo_root: Path, language: str, file: str) -> None:
    page = (repo_root / "docs" / "add-a-strategy.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```{language}\n(.*?)```", page, re.S)
    assert (repo_root / file).read_text(encoding="utf-8").endswith(block)


def test_a_strategy_is_a_public_name_by_its_file_alone() -> None:
    from cl_adapters.strategies.base import strategies

    own = {cls.__name__ for cls in map(strategies.get, strategies.names()) if cls.__module__.startswith("cl_adapters.")}
    others = {"AdaptedNet", "own_class_accuracy_metrics"}
    assert own | others == set(cl_adapters.strategies.__all__) <= set(dir(cl_adapters.strategies))


def test_cosine_to_class_means_of_both_features(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    backbone = FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))
    bank = AdapterBank(backbone, Bottleneck(bottleneck=4))
    bank.add_slot({key: torch.randn_like(value) for key, value in bank.fresh(torch.Generator()).items()})
    model = AdapterModel(backbone, bank)
    model.add_task([5, 2, 9])
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def both(x: Tensor) -> Tensor:
        return torch.cat([model.features(x, None), model.features(x, Route.single(0))], 1)

    with torch.no_grad():
        means = ClassMeans(32)
        means.head.append(both(x).reshape(3, 2, 32).mean(1))
        model.parts["class_means"] = means
        model.predictor = Concatenated()
        wanted = torch.nn.functional.cosine_similarity(both(x)[:, None], means.head.prototypes[None], dim=-1)
        torch.testing.assert_close(model.predict(x), wanted)
    model.save(tmp_path / "model")
    assert torch.equal(AdapterModel.load(tmp_path / "model", backbone).predict(x), model.predict(x))
