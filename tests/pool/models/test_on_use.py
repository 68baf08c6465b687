"""Adapters that are loaded when they are used, and the stacked copies that mixed batches read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.bank.bank import Route
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.nearest_key import NearestKey

Make = Callable[..., AdapterModel]


def alone(model: AdapterModel, x: Tensor) -> Tensor:
    """Logits image by image: then no image shares a matrix product with another."""
    return torch.cat([model.predict(row[None]) for row in x])


def counting(pool: AdapterPool) -> list[str]:
    """Ids whose tensors are asked for, in order."""
    asked: list[str] = []
    real = pool.tensors

    def tensors(id: str) -> dict[str, Tensor]:
        asked.append(id)
        return real(id)

    pool.tensors = tensors  # type: ignore[method-assign]
    return asked


def test_only_what_is_used_is_in_memory(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(6)
    pool = model.save_pool(tmp_path / "pool")
    asked = counting(pool)
    loaded = AdapterModel.from_pool(pool, limit=2)
    assert model.bank is not None
    assert loaded.bank is not None
    assert not asked, "nothing is loaded before it is used"
    assert loaded.num_slots == 6
    for slots in ([0], [1], [0], [2], [1], [4, 5, 3, 2, 1]):
        ids = torch.tensor(slots).repeat(24)[:24]
        with torch.inference_mode():
            mixed = loaded.features(x, Route.hard(ids))
            assert torch.equal(mixed, model.features(x, Route.hard(ids)))
        assert set(slots) <= set(loaded.bank.loaded)
        assert len(loaded.bank.loaded) <= max(2, len(slots))
    assert [int(id[-1]) for id in asked] == [0, 1, 2, 1, 3, 4, 5], "the least recently used goes first; others stay"
    with torch.no_grad():
        loaded.features(x, Route.single(5))
    assert loaded.bank.loaded == (4, 5), "back to the limit, newest first"
    assert sum(p.numel() for p in loaded.bank.parameters()) == 2 * sum(v.numel() for v in model.bank.export(0).values())
    assert not any(p.requires_grad for p in loaded.bank.parameters())
    for slot in range(6):
        given, wanted = loaded.bank.export(slot), model.bank.export(slot)
        assert all(torch.equal(value, given[key]) for key, value in wanted.items())
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin.predict(x), loaded.predict(x))


def test_mixed_batches_equal_one_by_one(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(6, predictor=NearestKey())
    loaded = AdapterModel.from_pool(model.save_pool(tmp_path / "pool"), limit=1)
    assert len(loaded.answer(x).adapter.unique()) > 3
    assert torch.allclose(loaded.predict(x), alone(loaded, x), atol=1e-5)


def test_an_adapter_that_changed_meanwhile(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(predictor=Fixed(slot=2))
    pool = model.save_pool(tmp_path / "pool")
    changed, gone = AdapterModel.from_pool(pool), AdapterModel.from_pool(pool)
    tensors = {key: value + 1 for key, value in pool.tensors("task-002").items()}
    pool.replace(pool.get("task-002"), tensors)
    with pytest.raises(PoolError, match="'task-002' was changed in the pool meanwhile: make the model again"):
        changed.predict(x)
    pool.remove("task-002")
    with pytest.raises(PoolError, match="'task-002' was changed in the pool meanwhile"):
        gone.predict(x)
    assert model.bank is not None
    with pytest.raises(ClAdaptersError, match="one set of adapters on use, with a limit of at least 1"):
        model.bank.load_on_use(2, lambda slot: {}, limit=0)


def test_stacked_tensors_follow_every_write(make_model: Make, x: Tensor) -> None:
    """What a mixed batch reads is never older than the slots, however they were written."""
    model = make_model()
    assert model.bank is not None
    ids = torch.arange(24) % 3

    def check() -> None:
        with torch.inference_mode():
            mixed = model.features(x, Route.hard(ids))
            single = torch.stack([model.features(x, Route.single(slot)) for slot in range(3)])
        assert torch.allclose(mixed, single[ids, torch.arange(24)], atol=1e-5)

    def write(change: Callable[[nn.Parameter], Any]) -> None:
        check()
        assert model.bank is not None
        with torch.no_grad():
            for parameter in model.bank.slot_parameters(1):
                change(parameter)
        check()

    write(lambda p: p.mul_(2))
    write(lambda p: p.copy_(torch.ones_like(p) / 7))
    write(lambda p: setattr(p, "data", p.data * 3))
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    check()
    model.load_state_dict(state, assign=True)
    check()
    model.double().float()
    check()
    twin = copy.deepcopy(model)
    write(lambda p: p.zero_())
    model = twin
    check()
    with torch.inference_mode():
        subset = model.features(x, Route.hard(ids % 2 * 2))
    with torch.no_grad():
        wanted = torch.stack([model.features(x, Route.single(slot)) for slot in (0, 2)])
    assert torch.allclose(subset, wanted[ids % 2, torch.arange(24)], atol=1e-5)
