"""Retrieval without training works in every strategy, and keys change nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, ConfigError, UnknownName
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import Keys, KeysConfig
from cl_adapters.predictors.base import predictor_from
from cl_adapters.predictors.knn_vote import KNNVote
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.predictors.soft_top_k import SoftTopK

WIDTH = 16
RETRIEVAL = (NearestKey(), KNNVote(k=3), SoftTopK(k=2))


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Noisy images of a colour per class."""

    def __init__(self, labels: tuple[int, ...], n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        colours = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        self.targets = [label for label in labels for _ in range(n)]
        self.x = colours[self.targets] + 0.3 * torch.randn(len(self.targets), 3, 16, 16, generator=draw)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], self.targets[i]


TASKS = ((7, 3), (11,), (0, 5))


@pytest.fixture(scope="module")
def stream() -> list[Any]:
    """Experiences of three tasks with ten images per class."""
    from avalanche import benchmarks
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    parts = [Images(task, 10, seed) for seed, task in enumerate(TASKS)]
    data = [AvalancheDataset([p], data_attributes=[DataAttribute(list(p.targets), "targets")]) for p in parts]
    made = benchmarks.benchmark_from_datasets(train=data, test=data)
    return list(benchmarks.with_classes_timeline(made).train_stream)


def trained(name: str, vit: nn.Module, stream: list[Any], **options: Any) -> Any:
    """A small strategy after these experiences."""
    from cl_adapters.strategies.base import strategies

    cls: Any = strategies.get(name)
    small: dict[str, Any] = {"train_epochs": 1, "train_mb_size": 10, "adapter": {"type": "bottleneck", "bottleneck": 4}}
    known = {field.name for field in dataclasses.fields(cls.Config)}
    given = {key: value for key, value in small.items() if key in known} | options
    strategy: Any = cls(model=vit, seed=5, evaluator=None, **given)
    for experience in stream:
        strategy.train(experience)
    return strategy


def test_every_retrieval_in_every_strategy(tiny_vit: Callable[..., nn.Module], stream: list[Any]) -> None:
    from cl_adapters.strategies.base import strategies

    x, _ = zip(*[stream[1].dataset[i][:2] for i in range(4)], strict=True)
    for name in strategies.names():
        vit = tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)
        strategy = trained(name, vit, stream[:2], keys="centroids")
        for predictor in RETRIEVAL:
            answer = strategy.model.answer(torch.stack(x), predictor=predictor)
            assert answer.logits.shape == (4, 3), name
            assert answer.logits.isfinite().all()


def test_keys_change_nothing_else_and_are_resumed(
    tiny_vit: Callable[..., nn.Module], stream: list[Any], tmp_path: Path
) -> None:
    def vit() -> nn.Module:
        return tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)

    config = KeysConfig(kind="features", held_out=0.3)
    without, model = trained("mos", vit(), stream).model, trained("mos", vit(), stream, keys=config).model
    assert "class_keys" not in without.parts
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith("parts.")}
    assert plain.keys() == without.state_dict().keys()
    assert all(torch.equal(value, plain[key]) for key, value in without.state_dict().items())
    keys = model.part("class_keys", Keys)
    assert keys.column_M.tolist() == [c for c in range(5) for _ in range(7)]
    assert len(keys.held_out_HD) == 15
    with torch.no_grad():
        f = model.backbone(stream[0].dataset[0][0][None])
    everything = torch.cat([keys.keys_MD, keys.held_out_HD])
    assert (everything - f).abs().amax(1).min() < 1e-5, "features of training images under the bare backbone"

    trained("mos", vit(), stream[:2], keys=config).model.save(tmp_path / "two")
    loaded = AdapterModel.load(tmp_path / "two", FrozenBackbone.wrap(vit()))
    resumed = trained("mos", loaded, stream[2:]).model  # goes on with the keys that it has
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ConfigError, match=r"this model keeps KeysConfig.*leave keys out"):
        trained("mos", resumed, [], keys="prototypes")
    with pytest.raises(ClAdaptersError, match="learned classes without keys"):
        trained("mos", without, [], keys="prototypes")


@pytest.mark.parametrize("inference", ["nearest_key", {"type": "soft_top_k", "k": 2}, SelfRefine(start="keys")])
def test_a_strategy_answers_by_the_rule_of_choice(
    inference: Any, tiny_vit: Callable[..., nn.Module], stream: list[Any], tmp_path: Path
) -> None:
    def vit() -> nn.Module:
        return tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)

    own = trained("mos", vit(), stream[:2], keys="prototypes").model
    model = trained("mos", vit(), stream[:2], keys="prototypes", predictor=inference).model
    wanted = predictor_from(inference)
    assert model.predictor == wanted != own.predictor
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    x = torch.stack([stream[0].dataset[i][0] for i in range(4)])
    assert torch.equal(model.predict(x), own.answer(x, predictor=wanted).logits.float())
    model.save(tmp_path / "saved")
    assert AdapterModel.load(tmp_path / "saved", FrozenBackbone.wrap(vit())).predictor == wanted


def test_rules_that_need_keys_or_do_not_exist(tiny_vit: Callable[..., nn.Module], stream: list[Any]) -> None:
    vit = tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)
    for inference in ("nearest_key", SelfRefine(start="keys")):
        with pytest.raises(ConfigError, match="looks inputs up by keys: pass keys='prototypes'"):
            trained("mos", vit, [], predictor=inference)
    trained("mos", vit, [], predictor=SelfRefine(max_steps=2))
    with pytest.raises(UnknownName, match="did you mean 'nearest_key'"):
        trained("mos", vit, [], predictor="nearest_keys")


def test_the_old_keyword_is_accepted_with_a_warning(tiny_vit: Callable[..., nn.Module]) -> None:
    vit = tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)
    with pytest.warns(DeprecationWarning, match=r"inference=\.\.\. is now predictor=\.\.\."):
        trained("mos", vit, [], inference=SelfRefine(max_steps=2))
    with pytest.raises(ConfigError, match="pass predictor alone"):
        trained("mos", vit, [], inference=SelfRefine(), predictor=SelfRefine())


def test_a_model_of_a_pool_is_not_trained_further(
    tiny_vit: Callable[..., nn.Module], stream: list[Any], tmp_path: Path
) -> None:
    """The pool has no class statistics: going on would align the head with those of the new classes alone."""
    strategy = trained("mos", tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2), stream[:2], keys="prototypes")
    pool = strategy.save_pool(tmp_path / "pool")
    loaded = AdapterModel.from_pool(pool)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    again = trained("mos", loaded, [])
    with pytest.raises(ClAdaptersError, match=r"made from a pool, which keeps no class statistics.*take model\.save"):
        again.train(stream[2])
    assert loaded.classes == [3, 7, 11]
    assert loaded.num_slots == 2
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    again.eval(stream[:2])  # evaluating is no training


@pytest.mark.parametrize("keys", [None, "prototypes"])
def test_without_adapters_a_model_of_a_pool_goes_on(
    tiny_vit: Callable[..., nn.Module], stream: list[Any], tmp_path: Path, keys: Any
) -> None:
    """Class means are all that SimpleCIL has, and the pool keeps them; but an index cannot take new keys."""

    def vit() -> nn.Module:
        return tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2)

    whole = trained("simple_cil", vit(), stream, keys=keys).model
    pool = trained("simple_cil", vit(), stream[:2], keys=keys).save_pool(tmp_path / "pool")
    model = trained("simple_cil", AdapterModel.from_pool(pool), stream[2:]).model
    x, _ = zip(*[stream[task].dataset[i][:2] for task in range(3) for i in range(4)], strict=True)
    assert model.classes == whole.classes
    assert torch.allclose(model.predict(torch.stack(x)), whole.predict(torch.stack(x)), atol=1e-6)
    if keys is not None:
        assert torch.equal(model.part("class_keys", Keys).keys_MD, whole.part("class_keys", Keys).keys_MD)
    assert model.part("class_keys", Keys).column_M.tolist() == [0, 1, 2, 3, 4], "one for each, as before"
    indexed = AdapterModel.from_pool(pool, index=AdapterIndex.build(pool))
    with pytest.raises(ClAdaptersError, match="made from a pool"):
        trained("simple_cil", indexed, stream[2:])
