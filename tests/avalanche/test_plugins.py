"""The model that Avalanche's plugins ask, in every strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import plugins as avalanche
from torch import Tensor, nn

from cl_adapters.errors import ConfigError, DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import MOS
from cl_adapters.strategies.base import strategies
from tests.avalanche.matrix import PLUGINS
from tests.avalanche.streams import pairs, two_experiences

Vit = Callable[[], nn.Module]
IDLE_LATER = ["aper", "ranpac", "simple_cil"]
"""Nothing is trained after the first task, so nothing can be protected."""
GOES_ON = [name for name in strategies.names() if name not in IDLE_LATER]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def trained(name: str, vit: Vit, plugins: list[Any], experiences: list[Any] | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {} if name == "simple_cil" else {"train_epochs": 2, "lr": 0.05}
    strategy: Any = strategies.get(name)(
        vit(), train_mb_size=6, evaluator=None, plugins=plugins, seed=0, **settings, **options
    )
    for experience in experiences or pairs(shuffled=True):
        strategy.train(experience)
    return strategy


def images() -> tuple[Tensor, Tensor]:
    items = [item for experience in pairs(shuffled=True) for item in experience.dataset]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


# --- plugins (all of them with every strategy: test_matrix.py) -------------------------------------------------------


@pytest.mark.parametrize("plugin", ["LwF", "GSS_greedy", "GenerativeReplay"])
def test_what_reads_task_labels_is_refused_where_there_are_none(plugin: str, vit: Vit) -> None:
    (given,) = PLUGINS[plugin].options()["plugins"]
    message = f"MOS cannot use {type(given).__name__} on this stream: it reads task labels"
    strategy: Any = MOS(vit(), plugins=[given], train_mb_size=4, train_epochs=1, evaluator=None)
    with pytest.raises(ConfigError, match=message):
        strategy.train(two_experiences()[0])
    assert strategy.model.classes == [] and strategy.clock.train_iterations == 0


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", strategies.names())
def test_the_strategys_model_answers_by_class_label(name: str, vit: Vit) -> None:
    strategy = trained(name, vit, [])
    x, _ = images()
    model = strategy.model.eval()
    logits_BL = model(x)
    assert logits_BL.shape == (24, 4) and strategy.model.classes != [0, 1, 2, 3]
    columns_BC = strategy.model.predict(x)
    assert torch.equal(logits_BL[:, strategy.model.classes], columns_BC)
    assert torch.equal(AdapterModel.predict(model, x), columns_BC), "outside Avalanche columns stay columns"
    half = trained(name, vit, [], pairs(shuffled=True)[:1]).model.eval()(x)
    assert half.shape == (24, 4) and bool((half[:, [0, 2]] == -1000).all()), "labels 0 and 2 were not learned"


@pytest.mark.parametrize("name", GOES_ON)
def test_gradients_reach_the_head_in_both_modes(name: str, vit: Vit) -> None:
    strategy = trained(name, vit, [])
    x, y = images()
    for training in (True, False):
        strategy.model.train(training)
        strategy.model.zero_grad()
        nn.functional.cross_entropy(strategy.model(x), y).backward()
        assert float(strategy.model.head.weight.grad.abs().sum()) > 0
        with torch.no_grad():
            assert not strategy.model(x).requires_grad


@pytest.mark.parametrize("name", GOES_ON)
def test_hooks_fire_and_a_copy_stays_as_it_was(name: str, vit: Vit) -> None:
    strategy = trained(name, vit, [], pairs()[:1])
    seen: list[int] = []
    strategy.model.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    x, _ = images()
    kept = copy.deepcopy(strategy.model)
    for training in (True, False):
        before = kept.train(training)(x).detach()
        assert before.isfinite().all()
        if training:
            strategy.train(pairs()[1])
        assert torch.equal(kept.train(training)(x), before) or not training
    assert 6 in seen


@pytest.mark.parametrize("name", ["mos", "ranpac", "sequential", "simple_cil"])
def test_labels_of_millions_make_no_logits_of_that_width(name: str, vit: Vit) -> None:
    x, _ = images()
    sets, labels = [], torch.tensor([30_000_000, 7, 12_345_678, 3])
    for pair in (labels[:2], labels[2:]):
        data: Any = torch.utils.data.TensorDataset(x[:12], pair.repeat(6))
        data.targets = data.tensors[1].tolist()
        sets.append(as_classification_dataset(data))
    experiences: Any = list(with_classes_timeline(benchmark_from_datasets(train=sets)).train_stream)
    widest = avalanche.EvaluationPlugin(accuracy_metrics(epoch=True, stream=True), loggers=[])
    settings: dict[str, Any] = {} if name == "simple_cil" else {"train_epochs": 1}
    strategy: Any = strategies.get(name)(vit(), train_mb_size=6, evaluator=widest, seed=0, **settings)
    shapes: set[tuple[int, ...]] = set()
    seen: list[int] = []

    class Shapes(avalanche.SupervisedPlugin[Any]):
        def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
            shapes.add(tuple(strategy.mb_output.shape))
            seen.extend(strategy.mb_output.tolist())

    strategy.plugins.append(Shapes())
    for experience in experiences:
        strategy.train(experience)
    found = strategy.eval(experiences)
    assert shapes == {(12,)} and set(seen) <= set(labels.tolist())
    columns = strategy.model.predict(torch.cat([x[:12], x[:12]])).argmax(1)
    right = torch.tensor(strategy.model.classes)[columns] == torch.cat([labels[:2].repeat(6), labels[2:].repeat(6)])
    (accuracy,) = (value for key, value in found.items() if key.startswith("Top1_Acc_Stream"))
    assert accuracy == pytest.approx(float(right.float().mean()))
    with pytest.raises(DataError, match="logits by class label would be 30,000,001 wide: number the classes from 0"):
        strategy.model(x)


def test_a_model_that_the_user_holds_is_the_same_in_columns(vit: Vit) -> None:
    held = trained("mos", vit, [], pairs()[:1]).model
    own: Any = AdapterModel.__new__(AdapterModel)
    object.__setattr__(own, "__dict__", held.__dict__)
    strategy: Any = MOS(own, train_epochs=1, train_mb_size=6, evaluator=None)
    strategy.train(pairs()[1])
    assert own.classes == strategy.model.classes == [0, 1, 2, 3]
    assert own.bank is strategy.model.bank and strategy.model is not own
    assert isinstance(strategy.model, AdapterModel)


def test_parameters_are_those_of_adapters_and_heads(vit: Vit) -> None:
    strategy = trained("mos", vit, [])
    names = [name for name, _ in strategy.model.named_parameters()]
    assert names and not any(name.startswith("backbone.") for name in names)
    first = [name for name, _ in trained("mos", vit, [], pairs()[:1]).model.named_parameters()]
    again: Any = trained("mos", vit, [], pairs()[:1])
    list(again.model.parameters())
    again.train(pairs()[1])
    assert [name for name, _ in again.model.named_parameters()][: len(first)] == first, "what is new comes last"
