"""Training accuracy over the experience's own classes, beside Avalanche's over all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn

from cl_adapters.strategies import MOS, SEMA, AdaptedNet, own_class_accuracy_metrics
from cl_adapters.strategies.base import strategies
from tests.avalanche.streams import two_experiences

Vit = Callable[[], nn.Module]
TRAINED = [name for name in strategies.names() if name != "simple_cil"]
EPOCH = "Top1_Acc_OwnClasses_Epoch/train_phase/train_stream"
BATCH = "Top1_Acc_OwnClasses_MB/train_phase/train_stream"


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def evaluator() -> EvaluationPlugin:
    """Both accuracies of training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin(
            accuracy_metrics(epoch=True), own_class_accuracy_metrics(minibatch=True, epoch=True), loggers=[]
        )


class Counts(SupervisedPlugin[Any]):
    """By hand: right answers among the newest classes, and samples of these, of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.epochs: list[float] = []
        self.start = 0

    def before_training_epoch(self, strategy: Any, **_: Any) -> None:
        self.start = len(self.batches)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        own = [strategy.model.classes[column] for column in strategy.columns]
        right = total = 0
        for logits, label in zip(strategy.mb_output.tolist(), strategy.mb_y.tolist(), strict=True):
            if label in own:
                total += 1
                right += max(own, key=logits.__getitem__) == label
        self.batches.append((right, total))

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        right, total = (sum(column) for column in zip(*self.batches[self.start :], strict=True))
        self.epochs.append(right / total)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # that replay has no effect where only the first task is trained
def test_it_counts_the_experiences_own_classes(name: str, vit: Vit) -> None:
    """Samples of a replay are left out; the value of an epoch is over its samples."""
    counts = Counts()
    strategy: Any = strategies.get(name)(
        vit(),
        train_mb_size=6,
        train_epochs=2,
        seed=0,
        evaluator=evaluator(),
        plugins=[ReplayPlugin(mem_size=6), counts],
    )
    for experience in two_experiences():
        strategy.train(experience)
    curves = strategy.evaluator.get_all_metrics()
    assert curves[EPOCH][1] == pytest.approx(counts.epochs)
    wanted = [right / total if total else math.nan for right, total in counts.batches]
    assert curves[BATCH][1] == pytest.approx(wanted, nan_ok=True)
    theirs = next(key for key in curves if key.startswith("Top1_Acc_Epoch"))
    assert curves[theirs][0] == curves[EPOCH][0], "beside Avalanche's own"


@pytest.mark.parametrize("cls", [MOS, SEMA])
def test_where_the_loss_is_masked_it_says_what_is_learned(cls: Any, vit: Vit) -> None:
    """The logits of old classes are not pushed down, so that Avalanche's accuracy stays behind."""
    strategy = cls(vit(), train_mb_size=6, train_epochs=3, lr=0.02, seed=0, evaluator=evaluator())
    strategy.train(two_experiences())
    curves = strategy.evaluator.get_all_metrics()
    theirs = next(values for key, (_, values) in curves.items() if key.startswith("Top1_Acc_Epoch"))
    pairs = list(zip(theirs, curves[EPOCH][1], strict=True))
    assert all(over_all <= own for over_all, own in pairs)
    assert pairs[0][0] == pairs[0][1], "in the first experience they are the same"
    assert any(over_all < own - 0.2 for over_all, own in pairs)


def test_without_a_sample_or_without_logits_it_is_no_number() -> None:
    (metric,) = own_class_accuracy_metrics(minibatch=True)
    data = SimpleNamespace(targets=[3, 1])
    strategy = SimpleNamespace(experience=SimpleNamespace(dataset=data), mb_y=torch.tensor([0, 2]))
    metric.before_training_exp(strategy)
    strategy.mb_output = torch.eye(4)[[0, 2]]
    metric.update(strategy)
    assert math.isnan(metric.result()), "no class of the experience in the batch"
    strategy.mb_output, strategy.mb_y = torch.tensor([3, 1]), torch.tensor([3, 1])
    metric.update(strategy)
    assert math.isnan(metric.result()), "labels in place of logits"
    strategy.mb_output = torch.tensor([[9.0, 2.0, 9.0, 1.0], [0.0, 0.0, 9.0, 1.0]])
    metric.update(strategy)
    assert metric.result() == 0.0
    strategy.mb_y = torch.tensor([1, 3])
    metric.update(strategy)
    assert metric.result() == 0.5
    assert str(metric) == "Top1_Acc_OwnClasses_MB"
    assert own_class_accuracy_metrics() == []


def test_labels_that_are_too_large_for_logits(vit: Vit) -> None:
    stream = two_experiences()
    strategy: Any = MOS(vit(), train_mb_size=6, train_epochs=1, evaluator=evaluator(), seed=0)
    far = [30_000_000 + label for label in (0, 1)]
    images = torch.stack([stream[0].dataset[place][0] for place in range(12)])
    data: Any = torch.utils.data.TensorDataset(images, torch.tensor(far * 6))
    data.targets = far * 6
    strategy.train(benchmark_from_datasets(train=[as_classification_dataset(data)]).train_stream)
    assert math.isnan(strategy.evaluator.get_last_metrics()[EPOCH])


def test_a_saved_strategy_goes_on_with_it(vit: Vit, tmp_path: Path) -> None:
    stream = two_experiences()
    strategy: Any = MOS(vit(), train_mb_size=6, train_epochs=1, evaluator=evaluator(), seed=0)
    strategy.train(stream[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.save(tmp_path / "saved")
    loaded: Any = MOS.load(tmp_path / "saved", strategy.model.backbone, evaluator=evaluator())
    for each in (strategy, loaded):
        each.train(stream[1])
    ours, theirs = (each.evaluator.get_all_metrics() for each in (strategy, loaded))
    assert ours[EPOCH] == theirs[EPOCH]
    assert repr(ours[BATCH]) == repr(theirs[BATCH])


def test_of_avalanches_own_strategies_too(vit: Vit) -> None:
    net = AdaptedNet(vit(), num_classes=4, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    strategy = Naive(model=net, optimizer=optimizer, train_mb_size=6, train_epochs=8, evaluator=evaluator())
    strategy.train(two_experiences())
    assert strategy.evaluator.get_last_metrics()[EPOCH] > 0.9
