"""The predictor beside a pool's records: it finds its own adapter under another name, and damage is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.errors import PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool
from cl_adapters.pool.compression import compress_records
from cl_adapters.pool.forget import forget

Make = Callable[..., AdapterModel]


@pytest.fixture
def pool(make_model: Make, tmp_path: Path) -> AdapterPool:
    """Of a rule that needs adapter "task-000" for every input, which is called "first" now."""
    made = make_model().save_pool(tmp_path / "pool")
    made.rename("task-000", "first")
    return made


def test_after_renaming_and_compressing(pool: AdapterPool) -> None:
    compress_records(pool, "fp16")
    assert AdapterModel.from_pool(pool).predictor.anchor == 0
    assert json.loads((pool.path / "model.json").read_text())["anchor"] == ["first", pool.get("first").adapter_sha]


def test_another_adapter_takes_the_old_name(pool: AdapterPool, x: Tensor) -> None:
    before = AdapterModel.from_pool(pool).predict(x)
    pool.rename("task-003", "task-000")
    after = AdapterModel.from_pool(pool)
    assert after.predictor.anchor == 0
    assert torch.equal(after.predict(x), before)


def test_forgetting_it_under_its_new_name(pool: AdapterPool) -> None:
    assert "this pool's predictor 'self_refine' cannot run" in "\n".join(forget(pool, "first").cannot_undo)


@pytest.mark.parametrize(
    "damage",
    [
        {"anchor": 5},
        {"anchor": ["first"]},
        {"anchor": ["first", None]},
        {"abstention": 3},
        {"abstention": {"similarity": None, "confidence": None, "calibration": {}}},
        {"abstention": {"similarity": "0.5", "confidence": None, "calibration": {}}},
        {"keys": []},
        {"predictor": "self_refine"},
    ],
)
def test_a_damaged_rule(pool: AdapterPool, damage: dict[str, Any]) -> None:
    place = pool.path / "model.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | damage))
    for use in (AdapterModel.from_pool, lambda pool: compress_records(pool, "fp16")):
        with pytest.raises(PoolError, match=rf"model\.json is damaged: its '{next(iter(damage))}' is in no known form"):
            use(pool)
    (problem,) = pool.verify().problems
    assert "model.json is damaged" in problem
