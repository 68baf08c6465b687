"""Classes that were learned before come again: domains, online streams, repetition, validation streams."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import Route
from cl_adapters.errors import DataError
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.strategies.base import AdapterStrategy, strategies
from cl_adapters.strategies.phases import Batch, current_task_loss
from tests.avalanche.small import differing, make, state, train
from tests.avalanche.streams import PATTERNS, benchmark, domains, halves, images, online, repetition

NAMES = strategies.names()
ONLINE = [name for name in NAMES if name != "mos"]


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))


# --- parts of experiences (every strategy on every stream: test_matrix.py) -------------------------------------------


@pytest.mark.parametrize("name", ONLINE)
def test_every_other_strategy_learns_online(name: str, backbone: FrozenBackbone) -> None:
    whole = halves()
    strategy = make(name, backbone, evaluator=EvaluationPlugin(accuracy_metrics(stream=True)))
    strategy.train(whole.train_stream[0])  # the methods that adapt in the first task do it on all of it
    train(strategy, online(whole)[3:])
    (reached,) = strategy.eval(whole.test_stream).values()
    assert reached > 0.4, "chance is 0.25"
    assert strategy.model.classes == [0, 2, 1, 3] and strategy.model.num_tasks == 4


def test_mos_refuses_a_part_of_an_experience(backbone: FrozenBackbone) -> None:
    strategy = make("mos", backbone)
    before = state(strategy.model)
    with pytest.raises(
        DataError, match=r"MOS makes an adapter for each .* \(OnlineCLExperience\) is 8 samples of another"
    ):
        strategy.train(online(halves())[0])
    assert not differing(before, state(strategy.model))
    strategy.train(halves().train_stream[0])


def test_a_part_that_names_the_classes_of_the_whole(backbone: FrozenBackbone) -> None:
    stream = online(benchmark(images(range(4), 6, 0)))
    for experience in stream:
        experience.classes_in_this_experience = {0, 1, 2, 3, 7}
    strategy = train(make("sequential", backbone), stream)
    assert strategy.model.classes == [0, 1, 2, 3]
    stream[0].classes_in_this_experience = {0, 1}
    with pytest.raises(DataError, match=r"does not name classes \[2, 3\]"):
        strategy.train(stream[0])
    whole = benchmark(images([0, 1], 6, 0)).train_stream[0]
    whole.classes_in_this_experience = {0, 1, 7}
    with pytest.raises(DataError, match=r"has no training sample of classes \[7\]"):
        strategy.train(whole)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "simple_cil"])
def test_replay_beside_classes_that_return(name: str, backbone: FrozenBackbone) -> None:
    strategy = train(make(name, backbone, plugins=[ReplayPlugin(mem_size=6)]), repetition().train_stream)
    assert strategy.model.predict(PATTERNS).isfinite().all()


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("simple_cil", {}), ("ranpac", {"train_adapter": False, "ridges": (10.0,)})]
)
@pytest.mark.parametrize("stream", [domains, repetition])
def test_as_if_all_data_had_come_at_once(
    name: str, options: dict[str, Any], stream: Callable[[], Any], backbone: FrozenBackbone
) -> None:
    parts = [(e.dataset, e.dataset.targets) for e in stream().train_stream]
    x = torch.stack([data[row][0] for data, targets in parts for row in range(len(targets))])
    every: Any = TensorDataset(x, torch.tensor([label for _, targets in parts for label in targets]))
    every.targets = every.tensors[1].tolist()
    once = train(make(name, backbone, **options), benchmark(every).train_stream).model
    turns = train(make(name, backbone, **options), stream().train_stream).model
    columns = turns.columns_of(torch.tensor(once.classes))
    torch.testing.assert_close(turns.predict(x)[:, columns], once.predict(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("cuts", [(7,), (1, 2), (1, 9), (5, 6, 19)])
def test_merged_gaussians_are_those_of_all_features(kind: Any, cuts: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    f_ND, other_ND = torch.randn(20, 6, generator=draw) * 3 + 5, torch.randn(8, 6, generator=draw)
    once, turns = ClassStatistics.of_kind(kind, 6), ClassStatistics.of_kind(kind, 6)
    parts = f_ND.tensor_split(cuts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one image
        for one, features in ((once, f_ND), (turns, parts[0])):
            one.add(other_ND)
            one.add(features)
    turns.sample(2, draw)  # and a Cholesky factor is kept
    for part, samples in zip(parts[1:], (0, *cuts)[1:], strict=True):
        turns.merge(1, part + 0.0, samples)

    def covariance(found: ClassStatistics) -> Tensor:
        return found.spreads[1].T @ found.spreads[1] if kind == "low_rank" else found.spreads[1]

    torch.testing.assert_close(turns.means_CD, once.means_CD)
    torch.testing.assert_close(covariance(turns), covariance(once), rtol=1e-4, atol=1e-5)
    assert torch.equal(turns.means_CD[0], once.means_CD[0]) and torch.equal(turns.spreads[0], once.spreads[0])
    drawn = torch.Generator().manual_seed(2)
    spread = turns.sample(4000, drawn)[0][4000:]
    torch.testing.assert_close(spread.var(0), once.sample(4000, drawn)[0][4000:].var(0), rtol=0.15, atol=0.2)
    with pytest.raises(DataError, match="not finite"):
        turns.merge(1, torch.full((2, 6), torch.nan), 20)


def test_a_masked_loss_is_over_the_classes_of_the_task_where_some_return() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own, columns = [1, 3, 4], torch.tensor([1, 0, 3, 2, 4])
    loss = current_task_loss(Batch(torch.zeros(5, 1), logits, columns), known=3, returning=[1])
    each = [F.cross_entropy(logits[[row]][:, own], torch.tensor([place])) for row, place in ((0, 0), (2, 1), (4, 2))]
    each += [F.cross_entropy(logits[[row]], columns[[row]]) for row in (1, 3)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[[0, 2, 4]][:, [0, 2]] == 0).all() and (gradient[[1, 3]] != 0).all()


def test_what_mos_keeps_of_a_class_that_returns(backbone: FrozenBackbone) -> None:
    """Its newest adapter answers; prototypes are under adapter 0; a class that stayed away keeps its bits."""
    stream = repetition().train_stream
    strategy = train(make("mos", backbone), stream[:2])
    before = state(strategy.model)
    train(strategy, stream[2:3])
    model, after = strategy.model, state(strategy.model)
    assert model.classes == [0, 2, 1] and model.task_of_column.tolist() == [0, 0, 1]
    assert model.returned == {0: 1, 1: 2} and model.samples == {0: 8, 1: 8, 2: 4}
    assert model.newest_task_of_column.tolist() == model.slot_of_column.tolist() == [1, 2, 1] and model.num_slots == 3
    for key in ("statistics.means", "prototypes.prototypes"):
        assert torch.equal(before[key][[0, 2]], after[key][[0, 2]]) and not torch.equal(before[key][1], after[key][1])
    for column in (0, 2):
        assert torch.equal(before[f"statistics.spread.{column}"], after[f"statistics.spread.{column}"])
    assert not torch.equal(before["statistics.spread.1"], after["statistics.spread.1"])
    x = torch.stack([x for part in (stream[0], stream[2]) for x, y, *_ in part.dataset if int(y) == 2])
    with torch.no_grad():
        under_0 = model.features(x, Route.single(0)).mean(0)
        mixture = torch.cat(
            [model.features(part, Route.single(slot)) for part, slot in zip(x.split(4), (0, 2), strict=True)]
        ).mean(0)
    torch.testing.assert_close(model.prototypes.prototypes[1], under_0)
    assert model.statistics is not None
    torch.testing.assert_close(model.statistics.means_CD[1], mixture)


def test_keys_of_a_class_that_returns_are_kept_beside_the_others(backbone: FrozenBackbone, tmp_path: Path) -> None:
    for config, rows in (
        (KeysConfig(held_out=0.0), 1),
        (KeysConfig(kind="centroids", per_class=2, held_out=0.0), 2),
    ):
        strategy = train(make("mos", backbone, keys=config, predictor="nearest_key"), repetition().train_stream)
        model = strategy.model
        keys = model.part(CLASS_KEYS, Keys)
        times = torch.tensor([3, 2, 2, 1])  # of classes 0, 2, 1, 3
        assert torch.equal(keys.column_M.bincount(), rows * times)
        assert keys.size_M is None or torch.equal(
            torch.zeros(4, dtype=torch.long).index_add(0, keys.column_M, keys.size_M), 4 * times
        )
        folder = model.save(tmp_path / config.kind)
        assert torch.equal(AdapterModel.load(folder, backbone).predict(PATTERNS), model.predict(PATTERNS))
        assert isinstance(model.predictor, NearestKey)


# --- saving, going on, refusing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_save_equals_never_stopping(name: str, backbone: FrozenBackbone, tmp_path: Path) -> None:
    stream = repetition().train_stream
    whole = train(make(name, backbone), stream)
    model: Any = backbone
    for task, experience in enumerate(stream):
        strategy = make(name, model)
        strategy.recall(stream[:task])
        folder = train(strategy, [experience]).model.save(tmp_path / str(task))
        model = AdapterModel.load(folder, backbone)
        assert torch.equal(model.predict(PATTERNS), strategy.model.predict(PATTERNS))
        assert not differing(state(model), state(strategy.model))
    assert not differing(state(model), state(whole.model))


@pytest.mark.parametrize("name", ["aper", "mos", "simple_cil"])
def test_a_model_whose_samples_were_not_counted_refuses_and_goes_on(name: str, backbone: FrozenBackbone) -> None:
    stream = repetition().train_stream
    strategy = train(make(name, backbone), stream[:1])
    strategy.model.samples = {}  # as an older release saved it
    before = state(strategy.model)
    with pytest.raises(DataError, match=r"classes \[0\] were learned in an earlier task, .* saved by an older release"):
        strategy.train(stream[1])
    assert not differing(before, state(strategy.model))
    train(strategy, benchmark(images([1, 3], 4, 0)).train_stream)
    assert strategy.model.classes == [0, 2, 1, 3] and set(strategy.model.samples) == {2, 3}


def test_a_strategy_that_says_nothing_of_them_takes_each_class_once(backbone: FrozenBackbone) -> None:
    """Such as one of somebody else, that appends a row for every class of an experience."""

    class Own(AdapterStrategy):
        def grow(self, task: int) -> None: ...

        def phases(self, task: int) -> Any:
            return ()

        def consolidate(self, task: int) -> None:
            means = [f_ND.mean(0) for f_ND in self.per_class(*self.training_features(None))]
            self.model.prototypes.append(torch.stack(means))

        def predictor(self, task: int, training: bool) -> Any:
            return strategies.get("simple_cil").predictor(self, task, training)

    stream = repetition().train_stream
    strategy = train(Own(backbone, evaluator=None), stream[:1])
    before = state(strategy.model)
    with pytest.raises(
        DataError, match=r"classes \[0\] were learned in an earlier task, and Own takes each class in one"
    ):
        strategy.train(stream[1])
    assert not differing(before, state(strategy.model))


# --- pools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [domains, repetition])
@pytest.mark.parametrize("name", ["mos", "simple_cil"])
def test_a_pool_of_classes_that_returned_answers_as_the_model(
    name: str, stream: Callable[[], Any], backbone: FrozenBackbone, tmp_path: Path
) -> None:
    """An adapter whose classes all went to newer ones is a record without classes."""
    model = train(make(name, backbone), stream().train_stream).model
    pool = model.save_pool(tmp_path / "pool")
    assert sorted(label for record in pool.records for label in record.labels) == [0, 1, 2, 3]
    if name == "mos" and stream is domains:
        assert [len(record.labels) for record in pool.records] == [0, 0, 4]
    made = AdapterModel.from_pool(pool, backbone=backbone)
    columns = made.columns_of(torch.tensor(model.classes))
    torch.testing.assert_close(made.predict(PATTERNS)[:, columns], model.predict(PATTERNS))


def test_an_index_finds_a_class_in_its_newest_adapter(backbone: FrozenBackbone, tmp_path: Path) -> None:
    model = train(make("mos", backbone, keys="prototypes"), repetition().train_stream).model
    pool = model.save_pool(tmp_path / "pool")
    with pytest.warns(UserWarning, match="2 adapters have no features .* task-000, task-001"):
        index = AdapterIndex.build(pool)
    found = [(hit.label, hit.record) for (hit,) in index.query(PATTERNS, k=1)]
    assert found == [(0, "task-003"), (1, "task-003"), (2, "task-002"), (3, "task-003")]
    assert [record.labels for record in pool.records] == [(), (), (2,), (0, 1, 3)]
