"""Task-incremental benchmarks: the task label of a test sample restricts the answer, or is ignored with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.strategies import Joint, Sequential, SimpleCIL
from cl_adapters.strategies.base import strategies
from tests.avalanche.streams import two_experiences

Vit = Callable[[], nn.Module]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def benchmark() -> Any:
    """Four classes of noise in two tasks with labels 0 and 1: nothing but the task label tells tasks apart."""
    labels = torch.arange(4).repeat(6)
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data: Any = torch.utils.data.TensorDataset(images, labels)
    data.targets = labels.tolist()
    both = as_classification_dataset(data)
    return nc_benchmark(both, both, n_experiences=2, task_labels=True, fixed_class_order=[0, 1, 2, 3])


class Answers(SupervisedPlugin[Any]):
    """What was answered under each task label."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[int, set[int]] = {}
        self.losses: list[float] = []

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        for task, answer in zip(strategy.mb_task_id.tolist(), strategy.mb_output.argmax(1).tolist(), strict=True):
            self.given.setdefault(task, set()).add(answer)
        self.losses.append(float(strategy.loss))


def small(cls: Any, model: nn.Module, **options: Any) -> Any:
    training = {} if cls is SimpleCIL else {"train_epochs": 1}
    return cls(model, train_mb_size=6, evaluator=None, **training, **options)


@pytest.mark.parametrize("name", strategies.names())
def test_answers_are_of_the_task(name: str, vit: Vit) -> None:
    answers, stream = Answers(), benchmark()
    strategy = small(strategies.get(name), vit(), task_incremental=True, plugins=[answers])
    for experience in stream.train_stream:
        strategy.train(experience)
        strategy.eval(stream.test_stream)
    answers.given.clear()
    strategy.eval(stream.test_stream)
    assert answers.given[0] <= {0, 1}
    assert answers.given[1] <= {2, 3}
    finite = torch.tensor(answers.losses).isfinite().tolist()
    assert finite == [True, False, True, True, True, True], "no class of the second task was known after the first"


def test_without_it_labels_are_ignored_with_one_warning(vit: Vit) -> None:
    answers, stream = Answers(), benchmark()
    strategy = small(Sequential, vit(), plugins=[answers])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for experience in stream.train_stream:
            strategy.train(experience)
        strategy.eval(stream.test_stream)
    assert sum("task label 1 is ignored" in str(each.message) for each in told) == 1
    assert answers.given[0] & {2, 3}


def test_a_stream_without_task_labels_is_refused_before_anything_changes(vit: Vit) -> None:
    strategy = small(SimpleCIL, vit(), task_incremental=True)
    with pytest.raises(ConfigError, match=r"needs one task label for each experience, and this one has none"):
        strategy.train(two_experiences()[0])
    assert strategy.model.classes == []
    stream = benchmark()
    strategy.train(stream.train_stream[0])
    with pytest.raises(ClAdaptersError, match="the samples of this stream have none"):
        strategy.eval(two_experiences())


def test_going_on_from_a_model(vit: Vit) -> None:
    stream = benchmark()
    first = small(Joint, vit(), task_incremental=True)
    first.train(stream.train_stream[0])
    rest = small(Joint, first.model, task_incremental=True)
    with pytest.raises(ClAdaptersError, match=r"the task label of class 0 is not known.*recall"):
        rest.eval(stream.test_stream)
    rest.recall(stream.train_stream[:1])
    rest.eval(stream.test_stream)
    rest.train(stream.train_stream[1])
