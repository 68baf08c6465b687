"""Conventions of Avalanche: seeds, metrics that ask the model, autocast, early stopping, mini-batches, data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, as_classification_dataset
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader, TaskBalancedDataLoader
from avalanche.evaluation import metrics
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks import load_benchmark
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.ridge import Ridge
from cl_adapters.strategies import LAE, MOS, SEMA, AdaptedNet, RanPAC, Sequential, SimpleCIL
from cl_adapters.strategies.base import strategies
from tests.avalanche.streams import two_experiences

Vit = Callable[[], nn.Module]
TRAINED = [name for name in strategies.names() if name != "simple_cil"]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def small(name: str, model: nn.Module, **options: Any) -> Any:
    """One epoch in batches of six; SEMA finds everything new."""
    values: dict[str, Any] = {"train_mb_size": 6, "evaluator": None}
    if name != "simple_cil":
        values["train_epochs"] = 1
    if name == "sema":
        values |= {"threshold": 1e-3, "descriptor_epochs": 1}
    if name == "ranpac":
        values["projection"] = 64
    return strategies.get(name)(model, **(values | options))


def weights(strategy: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in strategy.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("set_seeds", [RNGManager.set_random_seeds, torch.manual_seed], ids=["RNGManager", "torch"])
def test_without_a_seed_that_of_torch_decides(name: str, set_seeds: Callable[[int], Any], vit: Vit) -> None:
    found = []
    for seed in (3, 3, 4):
        set_seeds(seed)
        state = torch.get_rng_state()
        strategy = small(name, vit())
        assert strategy.seed == seed
        assert torch.equal(torch.get_rng_state(), state), "making a strategy draws nothing"
        strategy.train(two_experiences()[0])
        found.append(weights(strategy))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_seed_that_is_given_decides_alone(vit: Vit) -> None:
    found = []
    for around in (3, 4):
        RNGManager.set_random_seeds(around)
        strategy = small("mos", vit(), seed=0)
        assert strategy.seed == 0
        strategy.train(two_experiences()[0])
        found.append(weights(strategy))
    RNGManager.set_random_seeds(0)  # the same as seed=0
    strategy = small("mos", vit())
    strategy.train(two_experiences()[0])
    assert same(found[0], found[1])
    assert same(found[0], weights(strategy))


def test_an_adapted_net_follows_it_too(vit: Vit) -> None:
    found = []
    for seed in (3, 3, 4):
        RNGManager.set_random_seeds(seed)
        net = AdaptedNet(vit(), num_classes=4)
        assert net.seed == seed
        found.append({key: value.clone() for key, value in net.state_dict().items()})
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


# --- metrics that ask the model ---------------------------------------------------------------------------------------


def measured() -> EvaluationPlugin:
    """What Avalanche measures of a strategy on a stream with task labels; some of it asks the model."""
    return EvaluationPlugin(
        metrics.MAC_metrics(minibatch=True, epoch=True, experience=True),
        metrics.timing_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        metrics.cpu_usage_metrics(epoch=True, experience=True),
        metrics.accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        metrics.class_accuracy_metrics(experience=True, stream=True),
        metrics.topk_acc_metrics(top_k=2, experience=True, stream=True),
        metrics.loss_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        metrics.forgetting_metrics(experience=True, stream=True),
        metrics.bwt_metrics(experience=True, stream=True),
        metrics.amca_metrics(),
        metrics.confusion_matrix_metrics(stream=True, num_classes=4),
        metrics.labels_repartition_metrics(on_train=True, on_eval=True),
        loggers=[],
    )


def with_task_labels() -> Any:
    """Four classes in two tasks, items (x, y, 0)."""
    labels = torch.arange(4).repeat(4)
    data: Any = torch.utils.data.TensorDataset(torch.randn(16, 3, 16, 16), labels)
    data.targets = labels.tolist()
    both = as_classification_dataset(data)
    return nc_benchmark(both, both, n_experiences=2, task_labels=False, fixed_class_order=[0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of metrics that have nothing to say yet
@pytest.mark.parametrize("name", strategies.names())
def test_metrics_before_during_and_after_training(name: str, vit: Vit) -> None:
    benchmark = with_task_labels()
    strategy = small(name, vit(), evaluator=measured())
    before = strategy.eval(benchmark.test_stream)
    macs = [key for key in before if key.startswith("MAC_Exp")]
    assert all(before[key] > 0 for key in macs), "the bare backbone has a cost too"
    for experience in benchmark.train_stream:
        strategy.train(experience)
        after = strategy.eval(benchmark.test_stream)
    assert macs
    assert all(after[key] > 0 for key in macs)


def test_metrics_of_the_machine(vit: Vit) -> None:
    """They run threads of their own, which take a second to end."""
    evaluator = EvaluationPlugin(
        metrics.ram_usage_metrics(epoch=True), metrics.disk_usage_metrics(epoch=True), loggers=[]
    )
    strategy = small("sema", vit(), evaluator=evaluator)
    stream = two_experiences()
    strategy.eval(stream)
    found = strategy.train(stream[0])
    assert any(key.startswith("MaxRAMUsage") for key in found) and any(key.startswith("DiskUsage") for key in found)


def test_a_model_without_classes_has_no_column(vit: Vit) -> None:
    strategy: Any = MOS(vit(), evaluator=None)
    assert strategy.model(torch.zeros(2, 3, 16, 16)).shape == (2, 0)
    with pytest.raises(ClAdaptersError, match="knows no class yet"):
        AdapterModel(FrozenBackbone.wrap(vit()))(torch.zeros(2, 3, 16, 16))


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def images(stream: list[Any]) -> Tensor:
    return torch.stack([sample[0] for experience in stream for sample in experience.dataset])


@pytest.mark.parametrize("name", strategies.names())
def test_autocast_around_training(name: str, vit: Vit) -> None:
    stream = two_experiences()
    plain, mixed = (small(name, vit(), seed=0) for _ in range(2))
    for experience in stream:
        plain.train(experience)
        with autocast():
            mixed.train(experience)
            mixed.eval(stream)
    x = images(stream)
    wanted, found = plain.model(x), mixed.model(x)
    assert (wanted - found).abs().max() < 0.05 * wanted.abs().max()


def test_under_autocast_every_step_has_the_weights_of_its_moment(vit: Vit) -> None:
    """Autocast keeps converted weights until its block ends: here of the first step."""
    rows = []
    for mixed in (False, True):
        strategy = small("sequential", vit(), seed=0, lr=1.0, train_epochs=10)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            strategy.eval(two_experiences())
            strategy.train(two_experiences()[0])
        assert torch.is_autocast_cache_enabled()
        rows.append(strategy.model.head.weight.detach())
    assert (rows[0] - rows[1]).norm() < 0.05 * rows[0].norm()


def test_a_ridge_is_as_exact_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    projection, f_ND = torch.randn(8, 24, generator=draw), torch.randn(40, 8, generator=draw)
    columns_N = torch.arange(40) % 3
    targets_NK, held_N = nn.functional.one_hot(columns_N).float(), torch.arange(40) > 30

    def made() -> tuple[Tensor, ...]:
        ridge = Ridge(projection)
        ridge.grow(3)
        ridge.add(f_ND, columns_N)
        ridge.solve(1.0)
        return ridge.gram, ridge.sums_CM, ridge.weights_CM, ridge(f_ND), ridge.errors(f_ND, targets_NK, held_N, [1.0])

    wanted = made()
    with autocast():
        found = made()
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)


# --- early stopping ---------------------------------------------------------------------------------------------------


class Best(SupervisedPlugin[Any]):
    """Epochs that were begun, by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.epochs.append(0)

    def after_training_epoch(self, strategy: Any, **_: Any) -> None:
        self.epochs[-1] += 1


@pytest.mark.filterwarnings("ignore:Metric Top1_Acc_Stream used by the EarlyStopping")
@pytest.mark.parametrize("mode", ["epoch", "iteration"])
@pytest.mark.parametrize("name", TRAINED)
def test_early_stopping(name: str, mode: str, vit: Vit) -> None:
    """At a rate of almost nothing nothing gets better; SEMA stops in each of its phases, whose weights differ."""
    count = Best()
    evaluator = EvaluationPlugin(metrics.accuracy_metrics(stream=True), loggers=[])
    strategy = small(
        name,
        vit(),
        lr=1e-9,
        train_epochs=6,
        plugins=[EarlyStoppingPlugin(1, "train_stream", peval_mode=mode), count],
        evaluator=evaluator,
        eval_every=1,
        peval_mode=mode,
    )
    stream = two_experiences()
    for experience in stream:
        strategy.train(experience)
    phases = 1 if name != "sema" else max(1, len(strategy.expansions))
    assert phases == (2 if name == "sema" else 1)
    assert count.epochs[0] <= 2
    assert count.epochs[1] <= 2 * phases
    assert strategy.model(images(stream)).isfinite().all()
    if name == "sema":
        assert len(strategy.expansions) == 2


def test_early_stopping_brings_the_best_weights_back(vit: Vit) -> None:
    """Each epoch is worse than the first here, by a metric that says so."""
    evaluator = EvaluationPlugin(metrics.accuracy_metrics(stream=True), loggers=[])
    seen: list[dict[str, Tensor]] = []

    class Worse(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **_: Any) -> None:
            seen.append(weights(strategy))
            evaluator.last_metric_results["Top1_Acc_Stream/eval_phase/train_stream/Task000"] = 1.0 - 0.1 * len(seen)

    plugins = [Worse(), EarlyStoppingPlugin(2, "train_stream")]
    strategy = small("mos", vit(), train_epochs=9, plugins=plugins, evaluator=evaluator, eval_every=1)
    restored: list[dict[str, Tensor]] = []
    consolidate = strategy.consolidate

    def watched(task: int) -> None:
        restored.append(weights(strategy))
        consolidate(task)

    strategy.consolidate = watched
    with pytest.warns(UserWarning, match="not computed yet"):
        strategy.train(two_experiences()[0])
    assert len(seen) == 3
    assert not same(seen[0], seen[1])
    assert same(restored[0], seen[0])


def test_a_stop_in_the_last_epoch_does_not_stop_the_next_task(vit: Vit) -> None:
    class Stop(SupervisedPlugin[Any]):
        def after_training_iteration(self, strategy: Any, **_: Any) -> None:
            if strategy.clock.train_exp_counter == 0:
                strategy.stop_training()

    count = Best()
    small("mos", vit(), plugins=[Stop(), count]).train(two_experiences())
    assert count.epochs == [1, 1]


@pytest.mark.parametrize("kind", [Sequential, MOS, LAE, SEMA])
def test_early_stopping_without_new_measurements_is_refused(kind: Any, vit: Vit) -> None:
    for options in ({}, {"eval_every": 0}, {"eval_every": 3}, {"eval_every": 1, "peval_mode": "iteration"}):
        with pytest.raises(ConfigError, match=r"EarlyStoppingPlugin counts epochs .* eval_every=1, peval_mode='epoch'"):
            kind(vit(), plugins=[EarlyStoppingPlugin(2, "train_stream")], **options)
    with pytest.raises(ConfigError, match="EarlyStoppingPlugin watches Top1_Acc_Stream: give an evaluator"):
        kind(vit(), plugins=[EarlyStoppingPlugin(2, "train_stream")], eval_every=1, evaluator=None)


# --- mini-batches -----------------------------------------------------------------------------------------------------


class Samples(Dataset[Any]):
    def __init__(self, make: Callable[[Tensor, int], Any]) -> None:
        self.images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.targets = [0, 1] * 4
        self.make = make

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.make(self.images[index], self.targets[index])


def experience_of(make: Callable[[Tensor, int], Any], **options: Any) -> Any:
    data = Samples(make)
    wrapped: Any = AvalancheDataset([data], data_attributes=[DataAttribute(data.targets, "targets")], **options)
    return benchmark_from_datasets(train=[wrapped]).train_stream[0]


REFUSED: list[tuple[str, Callable[[Tensor, int], Any], str]] = [
    (
        "a batch that is a dictionary",
        lambda x, y: {"pixel_values": x, "labels": y},
        r"a dictionary of \['pixel_values', 'labels'\].*samples \(inputs, label\).*collate_fn",
    ),
    ("names that the backbone does not take", lambda x, y: ({"pixels": x}, y), r"a dictionary of \['pixels'\]"),
    ("images alone", lambda x, y: x, r"came as a Tensor; expected are samples \(inputs, label\)"),
    ("uint8", lambda x, y: (x.byte(), y), r"takes images .* of type uint8: batches of float32.*\[0, 1\]"),
    ("one channel", lambda x, y: (x[:1], y), r"takes images \[B, 3, 16, 16\], got \[\d, 1, 16, 16\]"),
    ("another size", lambda x, y: (x[:, :8, :8], y), r"takes images \[B, 3, 16, 16\], got \[\d, 3, 8, 8\]"),
    ("label -1", lambda x, y: (x, -1), r"sample 0 of the batch has label -1; labels are whole numbers from 0"),
    ("labels one-hot", lambda x, y: (x, torch.eye(2)[y]), r"labels of a mini-batch came in the shape \[\d, 2\]"),
    ("labels as words", lambda x, y: (x, "cat"), r"labels of a mini-batch came as (tuple|list); labels are whole"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("name", ["simple_cil", "sequential", "sema"])
def test_samples_that_cannot_be_used(name: str, make: Any, message: str, vit: Vit) -> None:
    strategy = small(name, vit())
    before = weights(strategy)
    with pytest.raises(DataError, match=message):
        strategy.train(experience_of(make))
    assert strategy.model.classes == []
    assert same(before, weights(strategy)), "nothing was changed"
    strategy.train(two_experiences()[0])
    with pytest.raises(DataError, match=message):
        strategy.eval(experience_of(make))


def test_what_comes_as_no_tensor_is_refused(vit: Vit) -> None:
    with pytest.raises(DataError, match=r"a training sample cannot be put into a batch: .*'object'"):
        SimpleCIL(vit(), evaluator=None).train(experience_of(lambda x, y: (object(), y)))


ACCEPTED: list[tuple[str, Callable[[Tensor, int], Any], dict[str, Any]]] = [
    ("float64, as float32", lambda x, y: (x.double(), y), {}),
    ("inputs by name", lambda x, y: ({"x": x}, y), {}),
    (
        "a collate function",
        lambda x, y: {"pixels": x, "label": y},
        {
            "collate_fn": lambda samples: [
                default_collate([sample["pixels"] for sample in samples]),
                torch.tensor([sample["label"] for sample in samples]),
            ]
        },
    ),
]


@pytest.mark.parametrize(("make", "options"), [case[1:] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
@pytest.mark.parametrize("name", ["simple_cil", "sequential", "sema", "mos"])
def test_samples_that_are_taken_as_plain_ones(name: str, make: Any, options: dict[str, Any], vit: Vit) -> None:
    found = []
    for each, more in ((make, options), (lambda x, y: (x, y), {})):
        strategy = small(name, vit(), seed=0)
        strategy.train(experience_of(each, **more))
        strategy.eval(experience_of(each, **more))
        found.append(weights(strategy))
    assert same(*found)


def test_inputs_by_name_are_cached_too(tiny_vit: Callable[..., nn.Module]) -> None:
    found = []
    for make in (lambda x, y: ({"x": x}, y), lambda x, y: (x, y)):
        strategy = small("mos", tiny_vit(width=16, heads=2, img_size=16), seed=0, blocks=(2,), cached_views=1)
        strategy.train(experience_of(make))
        found.append(weights(strategy))
    assert same(*found)


# --- data sets, the model ---------------------------------------------------------------------------------------------


def test_data_sets_of_ours_carry_their_tasks() -> None:
    benchmark = load_benchmark("digits", FrozenBackbone.load("vit_glyph_tiny"), seed=0)
    for stream in (benchmark.train_stream, benchmark.test_stream):
        data: Any = stream[0].dataset
        assert list(data.task_pattern_indices) == [0]
        assert len(data.task_set[0]) == len(data.eval()) == len(data.train())
        assert torch.equal(data.task_set[0].eval()[0][0], data.eval()[0][0])
    data = benchmark.train_stream[0].dataset
    balanced = TaskBalancedDataLoader(data.eval(), batch_size=8)
    assert next(iter(balanced))[0].shape[0] == 8
    replay = ReplayDataLoader(data.eval(), data.eval(), batch_size=4, batch_size_mem=4, task_balanced_dataloader=True)
    assert next(iter(replay))[0].shape[0] == 8
    buffer = ClassBalancedBuffer(max_size=4)
    buffer.update_from_dataset(data)
    assert sorted(int(label) for _, label, *_ in DataLoader(buffer.buffer)) == sorted([*set(data.targets)] * 2)


def test_model_adaptation_takes_the_strategys_model_alone(vit: Vit) -> None:
    strategy = small("mos", vit())
    strategy.experience, strategy.is_training = two_experiences()[0], True
    with pytest.raises(ConfigError, match=r"MOS grows strategy.model alone, got another AdapterModel"):
        strategy.model_adaptation(AdapterModel(FrozenBackbone.wrap(vit())))
    assert strategy.model.classes == []
    assert strategy.model_adaptation(strategy.model) is strategy.model
    assert strategy.model.classes == [0, 1]
    strategy.is_training = False
    assert strategy.model_adaptation() is strategy.model


def test_a_ridge_under_autocast_in_the_strategy(vit: Vit) -> None:
    stream = two_experiences()
    plain, mixed = (RanPAC(vit(), train_adapter=False, evaluator=None, seed=0, projection=64) for _ in range(2))
    for experience in stream:
        plain.train(experience)
        with autocast():
            mixed.train(experience)
    assert mixed.ridge.gram.dtype == mixed.ridge.weights_CM.dtype == torch.float32
    assert torch.allclose(mixed.ridge.gram, plain.ridge.gram, rtol=0.05, atol=0.05 * float(plain.ridge.gram.max()))
    answers = [strategy.model(images(stream)).argmax(1) for strategy in (plain, mixed)]
    assert torch.equal(*answers)
