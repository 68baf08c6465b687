"""Avalanche's plugins with every strategy: they act, or are refused by name; and the model that they ask."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models.generator import MlpVAE
from avalanche.training import plugins as avalanche
from avalanche.training.supervised import VAETraining
from torch import Tensor, nn

from cl_adapters.errors import ConfigError, DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import MOS
from cl_adapters.strategies.base import strategies

Vit = Callable[[], nn.Module]
IDLE_LATER = ["aper", "ranpac", "simple_cil"]
"""Nothing is trained after the first task, so nothing can be protected."""
GOES_ON = [name for name in strategies.names() if name not in IDLE_LATER]


def generative_replay() -> Any:
    generator: Any = MlpVAE((3, 16, 16), nhid=4)
    rate = torch.optim.Adam(generator.parameters(), lr=0.01)
    return avalanche.GenerativeReplayPlugin(
        generator_strategy=VAETraining(model=generator, optimizer=rate, train_mb_size=6, evaluator=None)
    )


PROTECT: dict[str, Callable[[], Any]] = {
    "EWC": lambda: avalanche.EWCPlugin(50.0),
    "EWC online": lambda: avalanche.EWCPlugin(50.0, mode="online", decay_factor=0.5),
    "MAS": lambda: avalanche.MASPlugin(lambda_reg=5.0),
    "SynapticIntelligence": lambda: avalanche.SynapticIntelligencePlugin(5.0),
    "LwF": lambda: avalanche.LwFPlugin(1.0, 2.0),
    "AGEM": lambda: avalanche.AGEMPlugin(6, 6),
    "GEM": lambda: avalanche.GEMPlugin(6, 0.5),
    "MIR": lambda: avalanche.MIRPlugin(batch_size_mem=3, mem_size=16, subsample=6),
    "GenerativeReplay": generative_replay,
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "GDumb": (avalanche.GDumbPlugin, "puts an untrained model in the place"),
    "FromScratch": (lambda: avalanche.FromScratchTrainingPlugin(), "puts an untrained model in the place"),
    "LFL": (lambda: avalanche.LFLPlugin(0.1), "brings a loss, head or model of its own"),
    "FeatureDistillation": (avalanche.FeatureDistillationPlugin, "brings a loss, head or model of its own"),
    "NCM": (avalanche.CurrentDataNCMUpdate, "brings a loss, head or model of its own"),
    "RWalk": (avalanche.RWalkPlugin, "keeps numbers of the parameters that the model has before it grows"),
    "RAR": (lambda: avalanche.RARPlugin(4, 8), "traces the model's layers"),
}


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def stream(shuffled: bool = False, classes: int = 4) -> list[Any]:
    """Experiences of two classes and 12 images with task label 0; shuffled: [3, 1] comes first."""
    labels, draw = torch.arange(classes).repeat(6), torch.Generator().manual_seed(1)
    images = torch.randn(classes, 3, 16, 16, generator=draw)[labels]
    images = images + 0.3 * torch.randn(6 * classes, 3, 16, 16, generator=draw)
    data: Any = torch.utils.data.TensorDataset(images, labels)
    data.targets = labels.tolist()
    order = [3, 1, 0, 2] if shuffled else list(range(classes))
    return list(nc_benchmark(data, data, classes // 2, task_labels=False, fixed_class_order=order).train_stream)


def trained(name: str, vit: Vit, plugins: list[Any], experiences: list[Any] | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {} if name == "simple_cil" else {"train_epochs": 2, "lr": 0.05}
    strategy: Any = strategies.get(name)(
        vit(), train_mb_size=6, evaluator=None, plugins=plugins, seed=0, **settings, **options
    )
    for experience in experiences or stream(shuffled=True):
        strategy.train(experience)
    return strategy


def images() -> tuple[Tensor, Tensor]:
    items = [item for experience in stream(shuffled=True) for item in experience.dataset]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


# --- plugins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", PROTECT)
@pytest.mark.parametrize("name", GOES_ON)
def test_what_protects_earlier_tasks_acts(name: str, plugin: str, vit: Vit) -> None:
    """The first task is trained as without it, the second is not, and nothing is left behind."""
    if plugin == "SynapticIntelligence":
        if name == "sema":
            with pytest.raises(ConfigError, match="SEMA cannot use SynapticIntelligencePlugin: it keeps"):
                trained(name, vit, [PROTECT[plugin]()])
            return
        with pytest.warns(UserWarning, match="Avalanche's SynapticIntelligencePlugin has no effect on a CPU"):
            trained(name, vit, [PROTECT[plugin]()])
        return
    experiences = stream(shuffled=True) if plugin != "MIR" else stream(classes=6)  # it acts from the third one on
    plain = trained(name, vit, [], experiences)
    protected = trained(name, vit, [PROTECT[plugin]()], experiences)
    before, after = dict(plain.model.named_parameters()), dict(protected.model.named_parameters())
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(before[key].requires_grad == after[key].requires_grad for key in before)
    x, _ = images()
    assert protected.model.predict(x).isfinite().all()


@pytest.mark.parametrize("plugin", PROTECT)
@pytest.mark.parametrize("name", IDLE_LATER)
def test_where_nothing_can_be_protected_it_is_refused(name: str, plugin: str, vit: Vit) -> None:
    cls, given = strategies.get(name), PROTECT[plugin]()
    idle = "nothing here" if name == "simple_cil" else "in the first task only"
    message = f"{cls.__name__} cannot use {type(given).__name__}: it protects earlier tasks .* trains {idle}. Train cl_"
    with pytest.raises(ConfigError, match=message):
        cls(vit(), plugins=[given])


@pytest.mark.parametrize("plugin", REFUSED)
@pytest.mark.parametrize("name", strategies.names())
def test_what_cannot_work_is_refused_by_name(name: str, plugin: str, vit: Vit) -> None:
    cls, (make, why) = strategies.get(name), REFUSED[plugin]
    given = make()
    with pytest.raises(ConfigError, match=f"{cls.__name__} cannot use {type(given).__name__}: it {re.escape(why)}"):
        cls(vit(), plugins=[given])


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
    half = trained(name, vit, [], stream(shuffled=True)[:1]).model.eval()(x)
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
    strategy = trained(name, vit, [], stream()[:1])
    seen: list[int] = []
    strategy.model.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    x, _ = images()
    kept = copy.deepcopy(strategy.model)
    for training in (True, False):
        before = kept.train(training)(x).detach()
        assert before.isfinite().all()
        if training:
            strategy.train(stream()[1])
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
    held = trained("mos", vit, [], stream()[:1]).model
    own: Any = AdapterModel.__new__(AdapterModel)
    object.__setattr__(own, "__dict__", held.__dict__)
    strategy: Any = MOS(own, train_epochs=1, train_mb_size=6, evaluator=None)
    strategy.train(stream()[1])
    assert own.classes == strategy.model.classes == [0, 1, 2, 3]
    assert own.bank is strategy.model.bank and strategy.model is not own
    assert isinstance(strategy.model, AdapterModel)


def test_parameters_are_those_of_adapters_and_heads(vit: Vit) -> None:
    strategy = trained("mos", vit, [])
    names = [name for name, _ in strategy.model.named_parameters()]
    assert names and not any(name.startswith("backbone.") for name in names)
    first = [name for name, _ in trained("mos", vit, [], stream()[:1]).model.named_parameters()]
    again: Any = trained("mos", vit, [], stream()[:1])
    list(again.model.parameters())
    again.train(stream()[1])
    assert [name for name, _ in again.model.named_parameters()][: len(first)] == first, "what is new comes last"
