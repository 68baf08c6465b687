"""Going on from a saved model inside Avalanche."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import Joint
from tests.avalanche.streams import two_experiences


def test_joint_wants_the_data_of_the_tasks_that_its_model_has_learned(
    tiny_vit: Callable[..., nn.Module], tmp_path: Path
) -> None:
    stream = two_experiences()
    backbone = FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))
    whole = Joint(backbone, train_epochs=1, train_mb_size=6, evaluator=None)
    whole.train(stream[0])
    folder = whole.model.save(tmp_path / "model")
    whole.train(stream[1])
    model = AdapterModel.load(folder, backbone)
    rest = Joint(model, train_epochs=1, train_mb_size=6, evaluator=None)
    before = model.bank.export(0) if model.bank is not None else {}
    with pytest.raises(
        ClAdaptersError, match=r"has those of 0 of the 1 .* strategy.recall\(benchmark.train_stream\[:1\]\)"
    ):
        rest.train(stream[1])
    assert model.classes == [0, 1]
    assert model.bank is not None
    assert all(torch.equal(value, before[key]) for key, value in model.bank.export(0).items()), "nothing was changed"
    rest.recall(stream[:1])
    rest.train(stream[1])
    found, wanted = model.bank.export(0), whole.model.bank.export(0)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted), "as if never stopped"
