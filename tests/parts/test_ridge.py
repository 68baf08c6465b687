"""RanPAC's edges: adapter types, tiny classes, strengths that cannot be used, what it saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from cl_adapters.adapters import adapters
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.ridge import Ridge, random_projection, unpack
from cl_adapters.predictors.ridge import RidgeClassifier
from cl_adapters.strategies.ranpac import RanPAC, RanPACConfig, hold_back


def experiences(*tasks: Sequence[int]) -> list[Any]:
    """One experience per list of labels, one image float32 [3, 16, 16] per label."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for labels in tasks:
        y = torch.tensor(labels)
        x = torch.randn(len(y), 3, 16, 16, generator=generator) + y[:, None, None, None] * 0.3
        targets = [DataAttribute(list(labels), "targets")]
        data.append(AvalancheDataset([TensorDataset(x, y)], data_attributes=targets))
    return list(benchmark_from_datasets(train=data).train_stream)


@pytest.fixture
def make(tiny_vit: Callable[..., nn.Module]) -> Callable[..., RanPAC]:
    """Factory of RanPAC on a ViT of width 16 and depth 2, without adapter unless asked for."""

    def build(**options: Any) -> RanPAC:
        values: dict[str, Any] = {"train_adapter": False, "projection": 24, "train_epochs": 1, "train_mb_size": 4}
        encoder = tiny_vit(width=16, heads=2, img_size=16, depth=2)
        return RanPAC(model=encoder, evaluator=None, **(values | options))

    return build


@pytest.mark.parametrize("kind", adapters.names())
def test_any_adapter_type_or_a_reason_before_training(make: Callable[..., RanPAC], kind: str) -> None:
    if adapters.get(kind)().layout == "map":
        with pytest.raises(IncompatibleBackbone, match="feature maps"):
            make(train_adapter=True, adapter={"type": kind})
        return
    strategy = make(train_adapter=True, adapter={"type": kind})
    first, second = experiences([0, 0, 0, 1, 1, 1], [2, 2, 3, 3])
    strategy.train(first)
    before = strategy.model.bank.export(0)
    strategy.train(second)
    after = strategy.model.bank.export(0)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert strategy.model.predictor == RidgeClassifier(slot=0)
    assert strategy.model.num_slots == 1


def test_one_image_per_class(make: Callable[..., RanPAC]) -> None:
    """Nothing to hold back: at first the largest strength, later the one before; mixed with larger classes they fit."""
    strategy = make(ridges=(1.0, 100.0, 1e4))
    first, second, third = experiences([0, 1, 2], [3, 3, 3, 3, 4], [5])
    strategy.train(first)
    assert strategy.ridge.ridges == [1e4]
    strategy.train(second)
    chosen = strategy.ridge.ridges[1]
    strategy.train(third)
    assert strategy.ridge.ridges == [1e4, chosen, chosen]
    assert chosen < 1e4
    assert strategy.model.predict(torch.randn(2, 3, 16, 16)).shape == (2, 6)


def test_one_strength_is_taken_without_a_choice(make: Callable[..., RanPAC], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ridge, "errors", lambda *args: pytest.fail("nothing to choose"))
    strategy = make(ridges=(7.0,))
    strategy.train(experiences([0, 0, 1, 1]))
    assert strategy.ridge.ridges == [7.0]


def test_strengths_below_the_rounding_of_the_sums(make: Callable[..., RanPAC]) -> None:
    """They are passed over where there is a choice, and refused where there is none."""
    (task,) = experiences([0, 0, 0, 1, 1, 1])
    strategy = make(ridges=(1e-30, 1e-29, 5.0))
    strategy.train(task)
    assert strategy.ridge.ridges == [5.0]
    assert strategy.ridge.resolution > 1e-29
    part = Ridge(random_projection(4, 50, torch.Generator().manual_seed(0)))
    part.grow(1)
    part.add(1000 * torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ClAdaptersError, match=r"ridge of 1\.0e-08 is too weak.*at least \d"):
        part.solve(1e-8)
    assert part.ridges == []
    part.solve(part.resolution)
    assert part.weights_CM.isfinite().all()


def test_hold_back() -> None:
    columns = torch.tensor([5] * 10 + [6] * 2 + [7] + [8] * 3)
    generator = torch.Generator().manual_seed(0)
    held = hold_back(columns, 0.2, generator)
    assert [int(held[columns == column].sum()) for column in (5, 6, 7, 8)] == [2, 1, 0, 1]
    assert torch.equal(held, hold_back(columns, 0.2, torch.Generator().manual_seed(0)))
    assert not torch.equal(held, hold_back(columns, 0.2, generator)), "another draw"
    almost = hold_back(columns, 0.99, generator)
    assert [int((~almost)[columns == column].sum()) for column in (5, 6, 7, 8)] == [1, 1, 1, 1], "never all"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"projection": 0}, "projection must be at least 1, got 0"),
        ({"ridges": ()}, r"ridges must be positive numbers, at least one, got \[\]"),
        ({"ridges": (1.0, -1.0)}, "ridges must be positive"),
        ({"ridges": (float("nan"),)}, "ridges.0: input should be a finite number"),
        ({"holdout": 0.0}, "holdout must be between 0 and 1"),
        ({"holdout": 1}, "holdout must be between 0 and 1"),
    ],
)
def test_settings_out_of_range(make: Callable[..., RanPAC], option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**option)


def test_strengths_of_the_released_code_are_the_default() -> None:
    ridges = RanPACConfig().ridges
    assert (len(ridges), ridges[0], ridges[8], ridges[-1]) == (17, 1e-8, 1.0, 1e8)


def test_what_is_saved_is_half_a_square_and_no_image(make: Callable[..., RanPAC], tmp_path: Path) -> None:
    strategy = make()
    strategy.train(experiences([0, 0, 1, 1], [2, 2]))
    path = strategy.model.save(tmp_path / "model")
    stored = {key: tuple(value.shape) for key, value in load_file(path / "parts" / "ridge.safetensors").items()}
    assert stored == {"gram": (300,), "projection_DM": (16, 24), "sums_CM": (3, 24), "weights_CM": (3, 24)}
    again = AdapterModel.load(path, FrozenBackbone.wrap(strategy.model.backbone.encoder)).part("ridge", Ridge)
    assert again.ridges == strategy.ridge.ridges
    assert len(again.ridges) == 2


def test_classes_that_came_after_the_last_solution_get_no_vote(make: Callable[..., RanPAC]) -> None:
    """What an evaluation in the middle of a task meets."""
    strategy = make()
    strategy.train(experiences([0, 0, 1, 1]))
    before = strategy.model.predict(torch.ones(1, 3, 16, 16))
    strategy.ridge.grow(2)
    after = strategy.model.predict(torch.ones(1, 3, 16, 16))
    assert after[:, 2:].eq(0).all()
    assert torch.allclose(after[:, :2], before)


def test_predictor_without_its_part(tiny_vit: Callable[..., nn.Module]) -> None:
    model = AdapterModel(FrozenBackbone.wrap(tiny_vit()))
    model.add_task([0])
    model.predictor = RidgeClassifier(slot=-1)
    with pytest.raises(ClAdaptersError, match="no part 'ridge'"):
        model.predict(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("shift", "calls"), [(0.0, 1), (0.0, 8), (1.0, 80), (3.0, 1)])
def test_resolution_is_near_the_real_rounding_of_the_sums(shift: float, calls: int) -> None:
    """Not below it, and at most 24 times as much: a bound by the trace would be 37 times as much."""
    draw = torch.Generator().manual_seed(0)
    part = Ridge(random_projection(64, 200, draw))
    part.grow(1)
    exact = torch.zeros(200, 200, dtype=torch.float64)
    for _ in range(calls):
        f = shift + torch.randn(1600 // calls, 64, generator=draw)
        part.add(f, torch.zeros(len(f), dtype=torch.long))
        h = part.expand(f).double()
        exact += h.T @ h
    rounding = float(torch.linalg.matrix_norm(unpack(part.gram.double(), 200) - exact, 2))
    assert rounding < part.resolution < 24 * rounding
