"""What MOS does around its training loop, task by task.

Origin: algorithm of MOS (paper behaviour where the released code differs): task t + 1 starts from A_t; statistics of
new classes under A_t, evaluation mode; prototypes under A_0, evaluation mode; alignment from the second task on, with
the data set's weight decay and 5 * batch size draws per class. Means and covariances are computed here in NumPy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.core import SupervisedPlugin
from torch import Tensor
from torch.utils.data import TensorDataset

from cl_adapters._seeding import generator
from cl_adapters.bank.bank import Route
from cl_adapters.model.alignment import Alignment, align
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.strategies.mos import MOS

MakeMos = Callable[..., MOS]


def features(strategy: MOS, experience: Any, slot: int) -> dict[int, npt.NDArray[np.float64]]:
    """Label to the features [N, D] of its images under one finished adapter."""
    x = torch.stack([item[0] for item in experience.dataset])
    y = np.array([int(item[1]) for item in experience.dataset])
    with torch.no_grad():
        f = strategy.model.features(x, Route.single(slot)).double().numpy()
    return {int(label): f[y == label] for label in np.unique(y)}


@pytest.fixture
def trained(make_mos: MakeMos, three_tasks: list[Any]) -> MOS:
    """Three tasks with a learning rate at which adapters differ, and dropout while training."""
    strategy = make_mos(adapter={"bottleneck": 4, "dropout": 0.5, "scale": 1.0}, lr=0.2, adapter_momentum=0.01)
    strategy.train(three_tasks)
    return strategy


def test_statistics_of_each_task_under_its_own_adapter(trained: MOS, three_tasks: list[Any]) -> None:
    statistics = trained.model.statistics
    assert statistics is not None and statistics.num_classes == 6
    for task, experience in enumerate(three_tasks):
        for label, f in features(trained, experience, task).items():
            assert np.abs(statistics.means_CD[label].numpy() - f.mean(0)).max() < 1e-5
            assert np.abs(statistics.spreads[label].numpy() - np.cov(f.T) - 1e-4 * np.eye(16)).max() < 1e-5
            if task:
                under_first = features(trained, experience, 0)[label]
                assert np.abs(under_first.mean(0) - f.mean(0)).max() > 1e-3, "another adapter would be seen"


def test_prototypes_of_every_task_under_the_first_adapter(trained: MOS, three_tasks: list[Any]) -> None:
    prototypes = trained.model.prototypes.prototypes
    for experience in three_tasks:
        for label, f in features(trained, experience, 0).items():
            assert np.abs(prototypes[label].numpy() - f.mean(0)).max() < 1e-5


def test_each_adapter_starts_from_the_one_before(make_mos: MakeMos, three_tasks: list[Any]) -> None:
    starts: list[dict[str, Tensor]] = []

    class Start(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            starts.append(strategy.model.bank.export(strategy.task))

    strategy = make_mos(plugins=[Start()], lr=0.2)
    strategy.train(three_tasks)
    assert not starts[0]["blocks.0.ffn/up"].any(), "the first one as the identity"
    for task in (1, 2):
        before = strategy.model.bank.export(task - 1)
        assert all(torch.equal(value, before[key]) for key, value in starts[task].items())
        after = strategy.model.bank.export(task)
        assert any(not torch.equal(value, after[key]) for key, value in starts[task].items())


def test_alignment_from_the_second_task_on(make_mos: MakeMos, three_tasks: list[Any]) -> None:
    """The head of a run with alignment is the aligned head of the run without."""
    settings = Alignment(epochs=3, lr=0.05)
    plain, aligned = make_mos(), make_mos(alignment={"epochs": 3, "lr": 0.05}, weight_decay=5e-4)
    for strategy in (plain, aligned):
        strategy.train(three_tasks[0])
    assert torch.equal(plain.model.head.weight, aligned.model.head.weight), "nothing to align at the first task"
    for strategy in (plain, aligned):
        strategy.train(three_tasks[1])
    statistics = aligned.model.statistics
    assert statistics is not None
    head = copy.deepcopy(plain.model.head)
    assert not torch.allclose(head.weight, aligned.model.head.weight, atol=1e-4)
    draws = Alignment(epochs=settings.epochs, lr=settings.lr, samples_per_class=5 * 4)
    align(head, statistics, draws, weight_decay=5e-4, generator=generator(3, "alignment", 1))
    assert torch.equal(head.weight, aligned.model.head.weight)
    assert torch.equal(head.bias, aligned.model.head.bias)


def test_dropout_acts_in_training_alone(make_mos: MakeMos, three_tasks: list[Any]) -> None:
    models = []
    for rate in (0.0, 0.5):
        strategy = make_mos(adapter={"bottleneck": 4, "dropout": rate, "scale": 1.0}, lr=0.2)
        strategy.train(three_tasks[0])
        models.append(strategy.model)
    without, with_dropout = (model.bank.export(0)["blocks.2.ffn/up"] for model in models)
    assert not torch.allclose(without, with_dropout, atol=1e-4)
    x = torch.stack([item[0] for item in three_tasks[0].dataset])
    assert torch.equal(models[1].predict(x), models[1].predict(x))


def test_statistics_and_prototypes_see_no_augmentation(make_mos: MakeMos) -> None:
    """Training goes through the "train" transform (here: black images), statistics through "eval"."""
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = [0, 1] * 4
    data = AvalancheDataset(
        [TensorDataset(x, torch.tensor(labels))],
        data_attributes=[DataAttribute(labels, "targets")],
        transform_groups=TransformGroups({"train": torch.zeros_like, "eval": torch.clone}),
    )
    (experience,) = benchmark_from_datasets(train=[data]).train_stream
    seen: list[Tensor] = []

    class Look(SupervisedPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(strategy.mb_x.clone())

    strategy = make_mos(plugins=[Look()])
    strategy.train(experience)
    assert len(seen) == 4 and not any(batch.any() for batch in seen)
    with torch.no_grad():
        f = strategy.model.features(x, Route.single(0))
    assert strategy.model.statistics is not None
    for label in (0, 1):
        mean = f[label::2].mean(0)
        assert torch.allclose(strategy.model.statistics.means_CD[label], mean, atol=1e-5)
        assert torch.allclose(strategy.model.prototypes.prototypes[label], mean, atol=1e-5)


def test_predicts_by_self_refined_retrieval(trained: MOS) -> None:
    assert trained.model.predictor == SelfRefine(max_steps=4, ensemble=True)
    assert trained.model.task_of_column.tolist() == [0, 0, 1, 1, 1, 2]


def test_the_defaults_are_those_of_the_released_cifar100_configuration() -> None:
    from cl_adapters.strategies.mos import MOSConfig

    config = MOSConfig()
    assert (config.train_epochs, config.lr, config.train_mb_size, config.weight_decay) == (20, 0.03, 48, 5e-4)
    assert (config.head_lr_factor, config.momentum, config.adapter_momentum, config.reg) == (0.1, 0.9, 0.1, 0.1)
    assert (config.merge, config.covariance, config.ensemble, config.temperature) == ("paper", "full", True, 0.8)
