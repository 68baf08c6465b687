"""Keywords of ``train`` and ``eval`` that go to data loaders, and what plugins see of cached views."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, as_classification_dataset
from avalanche.evaluation import metrics
from avalanche.training.plugins import (
    EvaluationPlugin,
    GenerativeReplayPlugin,
    GSS_greedyPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import TensorDataset

from cl_adapters.errors import ConfigError
from cl_adapters.strategies import MOS, SEMA
from cl_adapters.strategies.base import strategies
from tests.avalanche.streams import two_experiences

Vit = Callable[[], nn.Module]
LABELS = [3, 1, 1, 3, 3, 1, 3, 1, 1, 3]
"""Of ten images, so that batches of four leave two."""


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def experience() -> Any:
    x = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data: Any = AvalancheDataset(
        [TensorDataset(x, torch.tensor(LABELS))], data_attributes=[DataAttribute(LABELS, "targets")]
    )
    return benchmark_from_datasets(train=[data]).train_stream[0]


def old_style() -> list[Any]:
    """Two experiences with task labels, which Avalanche reads with a loader of its own."""
    data: Any = TensorDataset(torch.cat([each.dataset[i][0][None] for each in two_experiences() for i in range(12)]))
    labels = torch.tensor([each.dataset[i][1] for each in two_experiences() for i in range(12)])
    data = TensorDataset(data.tensors[0], labels)
    data.targets = labels.tolist()
    both = as_classification_dataset(data)
    return list(nc_benchmark(both, both, 2, task_labels=False, fixed_class_order=[0, 1, 2, 3]).train_stream)


class Labels(SupervisedPlugin[Any]):
    """The labels of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.seen.append(strategy.mb_y.tolist())


def small(name: str, model: nn.Module, **options: Any) -> Any:
    """Two epochs in batches of four."""
    values: dict[str, Any] = {"train_mb_size": 4, "train_epochs": 2, "evaluator": None, "seed": 0}
    if name == "sema":
        values |= {"threshold": 1e-3, "descriptor_epochs": 1, "scan_mb_size": 4}
    if name == "ranpac":
        values["projection"] = 64
    return strategies.get(name)(model, **(values | options))


CASES = {
    "MOS": partial(small, "mos"),
    "MOS, cached": partial(small, "mos", blocks=(1,), cached_views=2),
    "LAE": partial(small, "lae", drop_last=False),
    "SEMA": partial(small, "sema"),
    "SEMA, cached": partial(small, "sema", cached_views=2),
}
over_cases = pytest.mark.parametrize("make", list(CASES.values()), ids=list(CASES))


@over_cases
def test_shuffle_false_keeps_the_order_of_the_data_set(make: Any, vit: Vit) -> None:
    labels = Labels()
    strategy = make(vit(), plugins=[labels])
    strategy.train(experience(), shuffle=False)
    assert [label for batch in labels.seen for label in batch] == LABELS * 2
    labels.seen.clear()
    make(vit(), plugins=[labels]).train(experience())
    assert [label for batch in labels.seen for label in batch] != LABELS * 2


def test_shuffle_false_holds_for_all_that_sema_reads(vit: Vit) -> None:
    for options in ({}, {"cached_views": 2}):
        orders: list[list[int]] = []
        strategy = small("sema", vit(), **options)
        passes = strategy.new_pass

        def watched(batch: int, block: int, passes: Any = passes, orders: Any = orders) -> Any:
            loader = passes(batch, block)
            orders.append([int(label) for _, labels, *_ in loader for label in labels])
            return loader

        strategy.new_pass = watched
        for each in two_experiences():
            strategy.train(each, shuffle=False)
        assert strategy.expansions
        assert orders
        assert all(order in ([0, 1] * 6, [2, 3] * 6) for order in orders)


@over_cases
def test_drop_last_leaves_out_a_batch_that_is_not_whole(make: Any, vit: Vit) -> None:
    labels = Labels()
    make(vit(), plugins=[labels]).train(experience(), drop_last=True)
    assert [len(batch) for batch in labels.seen] == [4] * 4


@over_cases
def test_drop_last_keeps_the_only_batch(make: Any, vit: Vit) -> None:
    labels = Labels()
    make(vit(), plugins=[labels], train_mb_size=32).train(experience(), drop_last=True)
    assert [len(batch) for batch in labels.seen] == [10] * 2


READING: list[dict[str, Any]] = [
    {"pin_memory": True, "persistent_workers": True},
    {"num_workers": 1},
    {"num_workers": 1, "persistent_workers": True, "pin_memory": True},
]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(
    ("case", "stream"),
    [(case, two_experiences) for case in CASES if case != "LAE"] + [("MOS", old_style)],
    ids=[*(case for case in CASES if case != "LAE"), "MOS, old style"],
)
def test_how_samples_are_read_changes_nothing(case: str, stream: Any, vit: Vit) -> None:
    found: list[dict[str, Tensor]] = []
    for options in ({}, *READING):
        strategy = CASES[case](vit())
        for each in stream():
            strategy.train(each, **options)
            strategy.eval(each, **options)
        found.append(strategy.model.state_dict())
    for options, other in zip(READING, found[1:], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in found[0].items()), options


@pytest.mark.parametrize("name", ["mos", "sema"])
def test_workers_persist(name: str, vit: Vit) -> None:
    class Loader(SupervisedPlugin[Any]):
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            loader = strategy.dataloader
            assert (loader.persistent_workers, loader.num_workers, len(loader)) == (True, 1, 3)
            workers.append([process.pid for process in multiprocessing.active_children()])

    workers: list[list[int | None]] = []
    before = {process.pid for process in multiprocessing.active_children()}
    small(name, vit(), plugins=[Loader()]).train(experience(), num_workers=1, persistent_workers=True)
    assert len(workers) == 2
    assert set(workers[0]) - before == set(workers[1]) - before
    gc.collect()
    assert {process.pid for process in multiprocessing.active_children()} <= before, "they end with the training"


@pytest.mark.parametrize("name", strategies.names())
def test_an_unknown_keyword_is_refused_by_name(name: str, vit: Vit) -> None:
    cls = strategies.get(name)
    strategy: Any = cls(vit(), evaluator=None)
    message = rf"unknown keyword {{}} of {cls.__name__}\.{{}}.*drop_last, num_workers, persistent_workers, pin_memory"
    for call in ("train", "eval"):
        with pytest.raises(ConfigError, match=message.format("suffle", call) + ".*shuffle"):
            getattr(strategy, call)(experience(), suffle=False)
        with pytest.raises(ConfigError, match="did you mean 'num_workers'"):
            getattr(strategy, call)(experience(), num_worker=1)
        with pytest.raises(ConfigError, match=r"collate_fn .*is the data set's own matter"):
            getattr(strategy, call)(experience(), collate_fn=list)
    assert strategy.model.classes == []


def test_evaluations_in_between_take_the_same_keywords(vit: Vit) -> None:
    evaluator = EvaluationPlugin(metrics.accuracy_metrics(stream=True), loggers=[])
    found = small("mos", vit(), evaluator=evaluator, eval_every=1).train(experience(), shuffle=False, drop_last=True)
    assert any(key.startswith("Top1_Acc_Stream/eval_phase") for key in found)


# --- cached views -----------------------------------------------------------------------------------------------------


class Flip(SupervisedPlugin[Any]):
    """An augmentation as users write it."""

    def before_forward(self, strategy: Any, **_: Any) -> None:
        strategy.mbatch[0] = strategy.mbatch[0].flip(-1)


class Distil(SupervisedPlugin[Any]):
    """A loss on the images."""

    def before_backward(self, strategy: Any, **_: Any) -> None:
        strategy.loss += 0 * strategy.mb_x.sum()


@pytest.mark.parametrize("kind", [MOS, SEMA])
@pytest.mark.parametrize(
    "plugin",
    [
        LwFPlugin(),
        GSS_greedyPlugin(mem_size=8, input_size=[3, 16, 16]),
        partial(EvaluationPlugin, metrics.MAC_metrics(epoch=True), loggers=[]),
    ],
    ids=["LwFPlugin", "GSS_greedyPlugin", "EpochMAC"],
)
def test_plugins_of_images_are_refused_with_cached_views(
    kind: Any, plugin: Any, vit: Vit, request: pytest.FixtureRequest
) -> None:
    options = {"evaluator": plugin} if isinstance(plugin, partial) else {"plugins": [plugin]}
    name = request.node.callspec.id.split("-")[0]
    with pytest.raises(ConfigError, match=f"{name} looks at the images .*{kind.__name__} .*set cached_views=0"):
        kind(vit(), cached_views=1, **options)
    kind(vit(), **options)


@pytest.mark.parametrize(("plugin", "where"), [(Flip(), "before_forward"), (Distil(), "before_backward")])
def test_plugins_that_may_look_at_images_are_named(plugin: Any, where: str, vit: Vit) -> None:
    with pytest.warns(UserWarning, match=f"hidden states, not images, in {type(plugin).__name__}.{where}"):
        MOS(vit(), plugins=[plugin], cached_views=1, evaluator=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MOS(vit(), plugins=[plugin], evaluator=None)


def test_plugins_that_do_not_are_not(vit: Vit) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plugins = [ReplayPlugin(4), LRSchedulerPlugin(ReduceLROnPlateau(optimizer), metric="train_loss"), Labels()]
    evaluator = EvaluationPlugin(
        metrics.accuracy_metrics(minibatch=True, stream=True), metrics.MAC_metrics(experience=True), loggers=[]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MOS(vit(), optimizer, plugins=plugins, cached_views=1, evaluator=evaluator)


def test_generative_replay_is_refused_too(vit: Vit) -> None:
    with pytest.raises(ConfigError, match="GenerativeReplayPlugin"):
        MOS(vit(), plugins=[GenerativeReplayPlugin()], cached_views=1)
