"""Ridge regression from sums against numpy's solver on all samples at once.

Origin: RanPAC (McDonnell et al. 2023), algorithm 1; released RanPAC.py at 698e00c: ``replace_fc`` (sums, solution) and
``optimise_ridge_parameter`` (a fit on four fifths of the current task for each strength, squared error on the rest).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cl_adapters.bank.bank import Route
from cl_adapters.parts.ridge import Ridge, pack, random_projection, unpack
from cl_adapters.strategies.ranpac import RanPAC, hold_back

Doubles = npt.NDArray[np.float64]
RIDGES = (1e-3, 1e-1, 1.0, 10.0, 1e3, 1e6)


def samples(n: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features float32 [n, width] around class centres, and columns int64 [n] in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator)
    return centres[columns] + 0.5 * torch.randn(n, width, generator=generator), columns


def make(width: int, projection: int, classes: int, seed: int = 1) -> Ridge:
    part = Ridge(random_projection(width, projection, torch.Generator().manual_seed(seed)))
    part.grow(classes)
    return part


def projected(part: Ridge, f: Tensor) -> Doubles:
    hidden: Doubles = np.maximum(f.double().numpy() @ part.projection_DM.double().numpy(), 0)
    return hidden


def one_hot(columns: Tensor, classes: int) -> Doubles:
    targets: Doubles = np.eye(classes)[columns.numpy()]
    return targets


def solved(h: Doubles, y: Doubles, ridge: float) -> Doubles:
    """Weights [M, C], the normal equations as they stand."""
    return np.asarray(np.linalg.solve(h.T @ h + ridge * np.eye(h.shape[1]), h.T @ y), dtype=np.float64)


@pytest.mark.parametrize(("n", "width", "projection", "classes"), [(40, 6, 9, 4), (7, 5, 30, 3), (30, 12, 1, 2)])
def test_weights_are_those_of_the_normal_equations(n: int, width: int, projection: int, classes: int) -> None:
    f, columns = samples(n, width, classes)
    part = make(width, projection, classes)
    part.add(f, columns)
    for ridge in (0.5, 20.0):
        part.solve(ridge)
        wanted = solved(projected(part, f), one_hot(columns, classes), ridge)
        found = part.weights_CM.T.numpy()
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert part(f).numpy() == pytest.approx(projected(part, f) @ wanted, rel=1e-3, abs=1e-4)
    assert part.ridges == [0.5, 20.0]


def test_sums_do_not_depend_on_how_the_samples_come() -> None:
    """Three tasks in two orders, and everything at once: the same weights, in the order of the columns."""
    width, projection = 8, 20
    f, columns = samples(2500, width, 6)  # more than one batch of projections
    whole = make(width, projection, 6)
    whole.add(f, columns)
    whole.solve(3.0)
    for order in ((0, 1, 2), (2, 0, 1)):
        part = make(width, projection, 0)
        for place, task in enumerate(order):
            part.grow(2)
            mine = columns // 2 == task
            part.add(f[mine], columns[mine] % 2 + 2 * place)
            part.solve(3.0)
        there = [2 * task + i for task in order for i in range(2)]
        assert torch.allclose(part.weights_CM, whole.weights_CM[there], rtol=1e-3, atol=1e-5)
        assert torch.allclose(part.gram, whole.gram, rtol=1e-5)
        assert torch.allclose(part.sums_CM, whole.sums_CM[there], rtol=1e-5)


@pytest.mark.parametrize("projection", [12, 40, 39, 41], ids=["primal", "square", "primal by one", "dual by one"])
def test_errors_of_all_strengths_are_those_of_single_fits(projection: int) -> None:
    """40 samples are fitted: both forms, and both explicit formulas, give the same validation errors."""
    f, columns = samples(52, 6, 3)
    held = torch.zeros(52, dtype=torch.bool)
    held[torch.randperm(52, generator=torch.Generator().manual_seed(4))[:12]] = True
    part = make(6, projection, 3)
    h, y = projected(part, f), one_hot(columns, 3)
    fit, out = ~held.numpy(), held.numpy()
    primal = [np.mean((h[out] @ solved(h[fit], y[fit], ridge) - y[out]) ** 2) for ridge in RIDGES]
    kernel = h[fit] @ h[fit].T
    dual = [
        np.mean((h[out] @ h[fit].T @ np.linalg.solve(kernel + ridge * np.eye(len(kernel)), y[fit]) - y[out]) ** 2)
        for ridge in RIDGES
    ]
    found = part.errors(f, torch.from_numpy(y), held, RIDGES).numpy()
    assert found == pytest.approx(primal, rel=1e-4)
    assert found == pytest.approx(dual, rel=1e-4)
    assert max(primal) > 1.5 * min(primal), "the strength matters here"
    assert not part.gram.any(), "nothing is added by looking"


def test_errors_of_more_samples_than_one_batch() -> None:
    f, columns = samples(4000, 4, 2)
    held = torch.arange(4000) % 3 == 0  # 2666 fitted, 1334 held back
    part = make(4, 10, 2)
    h, y = projected(part, f), one_hot(columns, 2)
    wanted = [np.mean((h[::3] @ solved(h[~held.numpy()], y[~held.numpy()], r) - y[::3]) ** 2) for r in RIDGES]
    assert part.errors(f, torch.from_numpy(y), held, RIDGES).numpy() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_packed_triangle(m: int) -> None:
    root = torch.randn(m, m, generator=torch.Generator().manual_seed(m))
    square = root @ root.T
    square = (square + square.T) / 2
    packed = pack(square)
    assert torch.equal(packed, square[tuple(torch.triu_indices(m, m))])
    assert torch.equal(unpack(packed, m), square)
    part = Ridge(torch.empty(3, m))
    part.gram = packed
    assert part.resolution == pytest.approx(float(square.norm()) * 2.0**-23)


# --- the strategy ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make_ranpac(tiny_vit: Callable[..., torch.nn.Module]) -> Callable[..., RanPAC]:
    """Factory of RanPAC on a ViT of width 16 and depth 3, with 20 projections."""

    def make(**options: Any) -> RanPAC:
        values: dict[str, Any] = {
            "adapter": {"bottleneck": 4},
            "train_mb_size": 4,
            "train_epochs": 2,
            "projection": 20,
        }
        return RanPAC(model=tiny_vit(width=16, heads=2, img_size=16), evaluator=None, seed=3, **(values | options))

    return make


def stacked(task: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of one experience."""
    items = list(task.dataset)
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


@pytest.mark.parametrize("train_adapter", [True, False])
def test_whole_strategy(make_ranpac: Callable[..., RanPAC], three_tasks: list[Any], train_adapter: bool) -> None:
    """After three tasks: the normal equations on all images under the first task's adapter, with the chosen ridge."""
    strategy = make_ranpac(train_adapter=train_adapter)
    model = strategy.model
    trained = []
    for task in three_tasks:
        strategy.train(task)
        trained.append(strategy.trainable_parameters)
    head, adapter = 2 * 16 + 2, 3 * (2 * 16 * 4 + 16 + 4)
    assert trained == ([head + adapter, 0, 0] if train_adapter else [0, 0, 0])
    assert model.num_slots == int(train_adapter)
    assert model.head.num_classes == model.prototypes.num_classes == 0
    if model.bank is not None:
        assert any(value.any() for key, value in model.bank.export(0).items() if key.endswith("up")), "it was trained"
        assert not any(parameter.requires_grad for parameter in model.bank.parameters())
    x, labels = (torch.cat(parts) for parts in zip(*map(stacked, three_tasks), strict=True))
    route = Route.single(0) if train_adapter else None
    with torch.no_grad():
        f = model.features(x, route)
    ridge = strategy.ridge.ridges[-1]
    weights = solved(projected(strategy.ridge, f), one_hot(model.columns_of(labels), 6), ridge)
    assert model.predict(x).numpy() == pytest.approx(projected(strategy.ridge, f) @ weights, rel=1e-3, abs=1e-4)
    answer = model.answer(x)
    assert answer.passes.tolist() == [1] * len(x)
    assert answer.adapter.tolist() == [0 if train_adapter else -1] * len(x)


@pytest.mark.parametrize("projection", [6, 20], ids=["primal", "dual"])
def test_strength_is_the_best_on_the_held_back_images_of_the_task(
    make_ranpac: Callable[..., RanPAC], three_tasks: list[Any], projection: int
) -> None:
    ridges = tuple(10.0**power for power in range(-1, 7))
    strategy = make_ranpac(projection=projection, train_adapter=False, ridges=ridges, holdout=0.3)
    for number, task in enumerate(three_tasks[:2]):
        strategy.train(task)
        x, labels = stacked(task)
        with torch.no_grad():
            h = projected(strategy.ridge, strategy.model.features(x, None))
        columns = strategy.model.columns_of(labels)
        held = hold_back(columns, 0.3, strategy.generator("held back", number)).numpy()
        y = one_hot(columns - columns.min(), int(columns.max() - columns.min()) + 1)
        errors = [np.mean((h[held] @ solved(h[~held], y[~held], ridge) - y[held]) ** 2) for ridge in ridges]
        assert strategy.ridge.ridges[number] == ridges[int(np.argmin(errors))]
    assert min(ridges) < strategy.ridge.ridges[0] < max(ridges), "neither end: there was something to choose"
