"""The kinds of test that Avalanche applies to its own strategies, with every strategy here.

Some have their test elsewhere (``contracts`` is tests/contracts/strategies, the other files are beside this one):

============================================  ======================================================================
one experience of every style                 contracts/test_life_cycle.py: test_learns_every_style_of_experience
several experiences in one call               test_several_experiences_in_one_call
every callback, with clock, batch and output  test_callbacks_come_as_in_avalanche
forward hooks                                 test_plugins.py: test_hooks_fire_*; test_forward_without_labels
steps and groups of the optimizer             test_every_step_is_one_of_the_optimizer
periodic evaluation                           test_periodic_evaluation
streams of evaluation, grouped by name        test_streams_of_evaluation
evaluation before training                    contracts/test_life_cycle.py: test_before_the_first_task
stop_training()                               test_stop_training_ends_a_phase
EarlyStoppingPlugin                           test_conventions.py: test_early_stopping*
LRSchedulerPlugin                             test_recipe.py: test_a_schedule_*; test_a_schedule_that_*_is_refused
optimizer, criterion, by position             test_recipe.py: test_an_own_*, test_by_position_as_in_avalanche
unknown keywords                              contracts/test_bad_input.py: test_unknown_option_gets_a_suggestion
loggers                                       test_loggers_write_what_was_measured; contracts/test_life_cycle.py
metrics, points of their curves               test_conventions.py: test_metrics_*; test_curves_have_a_point_*
strict checks of the evaluator's streams      test_a_stream_that_is_not_whole
accuracy of the task's own classes            test_own_class_accuracy.py
plugins of unknown callbacks                  test_unknown_callbacks_are_warned_of
plugins that are added later                  test_a_plugin_that_is_added_later_*
ReplayPlugin                                  test_replay.py: test_replay_brings_old_classes_into_training
storage policies of ReplayPlugin              test_memory_is_as_full_as_it_can_be
EWC, MAS, LwF, AGEM, GEM, MIR, ...            test_plugins.py: test_what_protects_*, test_where_nothing_*
GDumb, LFL, NCM, RWalk, ...                   test_plugins.py: test_what_cannot_work_is_refused_by_name
task labels                                   test_task_labels.py
online streams, classes that return           test_returning_classes.py: test_every_strategy_learns, *_online
online streams that know their whole          test_parts_that_know_their_whole_are_experiences_too
transforms of training and evaluation         test_each_side_has_its_transform
data loader and collate functions             test_loader_options.py; test_conventions.py: test_samples_that_are_*
mini-batches that are dictionaries            test_conventions.py: test_samples_that_are_taken_as_plain_ones
what is left behind by train and eval         test_nothing_is_left_behind
checkpoints, saving and going on              test_save_and_load.py: test_a_checkpoint_of_avalanche_goes_on_too
reproducibility                               contracts/test_life_cycle.py: test_another_seed_*, test_styles_*
============================================  ======================================================================
"""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import nc_benchmark, split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import CSVLogger, TensorboardLogger, TextLogger
from avalanche.training import plugins as avalanche
from avalanche.training.storage_policy import ClassBalancedBuffer, ExperienceBalancedBuffer
from avalanche.training.supervised import Cumulative, Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_adapters.errors import ConfigError
from cl_adapters.strategies import LAE, MOS, AdaptedNet, Sequential
from cl_adapters.strategies.base import strategies

Vit = Callable[[], nn.Module]
TRAINED = [name for name in strategies.names() if name != "simple_cil"]
EVERY = pytest.mark.parametrize("name", strategies.names())


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """Two experiences of two classes in the order 3, 1, 0, 2: 12 images each, two batches of six."""
    labels, draw = torch.arange(4).repeat(6), torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=draw)[labels] + 0.3 * torch.randn(24, 3, 16, 16, generator=draw)
    data: Any = TensorDataset(images, labels)
    data.targets = labels.tolist()
    return nc_benchmark(data, data, 2, task_labels=False, fixed_class_order=[3, 1, 0, 2])


def make(name: str, model: nn.Module, **options: Any) -> Any:
    """Two epochs in batches of six."""
    cls: Any = strategies.get(name)
    small: dict[str, Any] = {"train_epochs": 2, "train_mb_size": 6, "eval_mb_size": 6, "alignment": {"epochs": 1}}
    small |= {"projection": 24, "descriptor_epochs": 1, "seed": 0, "evaluator": None}
    known = {key: value for key, value in small.items() if key in cls.__signature__.parameters}
    return cls(model, **(known | options))


def measured(*metrics: Any, **options: Any) -> avalanche.EvaluationPlugin:
    """An evaluator of these metrics, quiet about having no logger."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return avalanche.EvaluationPlugin(*metrics, **options)


def weights(strategy: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in strategy.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# --- the loops --------------------------------------------------------------------------------------------------------


class Trace(avalanche.SupervisedPlugin[Any]):
    """Every callback of Avalanche, with what a plugin finds in that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __getattribute__(self, key: str) -> Any:
        if not key.startswith(("before_", "after_")):
            return super().__getattribute__(key)

        def note(strategy: Any, **_: Any) -> None:
            clock = strategy.clock
            batch: tuple[Any, ...] | None = None
            if "iteration" in key or "ward" in key or "update" in key:
                batch = tuple(strategy.mb_x.shape), strategy.mb_y.dtype, strategy.mb_task_id.tolist()
                output = strategy.mb_output
                if key != "before_forward" and not (key.startswith("before") and "iteration" in key):
                    batch = (*batch, None if "eval_forward" in key else len(output))
            self.calls.append(
                (
                    key,
                    batch,
                    strategy.is_training,
                    strategy.model.training,
                    None if strategy.experience is None else strategy.experience.current_experience,
                    *(clock.train_iterations, clock.train_exp_counter, clock.train_exp_epochs),
                    *(clock.train_exp_iterations, clock.train_epoch_iterations, clock.total_iterations),
                )
            )

        return note


@EVERY
def test_callbacks_come_as_in_avalanche(name: str, vit: Vit, benchmark: Any) -> None:
    """Each callback, its order, count, clock, experience, batch and mode: as those of Naive in as many epochs.

    Joint trains on all data so far, so it is compared with Cumulative.
    """
    ours, theirs = Trace(), Trace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a plugin has no effect where nothing is trained
        strategy = make(name, vit(), plugins=[ours], eval_every=0)
    net, criterion = AdaptedNet(vit(), num_classes=4, seed=0), nn.CrossEntropyLoss()
    options: dict[str, Any] = {"train_mb_size": 6, "eval_mb_size": 6, "eval_every": 0, "evaluator": None}
    kind: Any = Cumulative if name == "joint" else Naive
    rate = torch.optim.SGD(net.parameters(), lr=0.1)
    reference = kind(model=net, optimizer=rate, criterion=criterion, plugins=[theirs], **options)
    for experience in benchmark.train_stream:
        ours.calls.clear()
        theirs.calls.clear()
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        epochs = sum(call[0] == "before_training_epoch" for call in ours.calls)
        reference.train_epochs = epochs
        reference.train(experience, eval_streams=[benchmark.test_stream])
        strategy.eval(benchmark.test_stream)
        reference.eval(benchmark.test_stream)
        assert ours.calls == theirs.calls
        assert {call[0] for call in ours.calls} >= {"before_training", "after_eval", "after_train_dataset_adaptation"}
        assert epochs or strategies.get(name).trains_once or name == "simple_cil"


@pytest.mark.parametrize("name", TRAINED)
def test_every_step_is_one_of_the_optimizer(name: str, vit: Vit, benchmark: Any) -> None:
    """One step for each batch; in the groups are parameters of the model, of which some have gradients."""
    steps: list[int] = []

    class Groups(avalanche.SupervisedPlugin[Any]):
        def before_update(self, strategy: Any, **_: Any) -> None:
            groups = strategy.optimizer.param_groups
            parameters = [parameter for group in groups for parameter in group["params"]]
            assert {id(p) for p in parameters} <= {id(p) for _, p in strategy.model.named_parameters()}
            assert any(p.grad is not None and p.grad.any() for p in parameters)

    strategy = make(name, vit(), plugins=[Groups()])
    strategy.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert len(steps) == strategy.clock.train_iterations > 0


@EVERY
def test_several_experiences_in_one_call(name: str, vit: Vit, benchmark: Any) -> None:
    """A stream, a list, or one call for each: the same model, and the clock has counted the same."""
    found = []
    for calls in ([benchmark.train_stream], [list(benchmark.train_stream)], list(benchmark.train_stream)):
        strategy = make(name, vit())
        for experiences in calls:
            strategy.train(experiences)
        assert strategy.clock.train_exp_counter == 2
        found.append(weights(strategy))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@EVERY
def test_nothing_is_left_behind(name: str, vit: Vit, benchmark: Any) -> None:
    """Of data, batches and experiences, after training and after evaluation."""
    strategy = make(name, vit(), eval_every=1)
    for call in (strategy.train, strategy.eval):
        call(benchmark.train_stream[0])
        assert strategy.experience is strategy.mbatch is strategy.mb_output is strategy.adapted_dataset is None
        assert list(strategy.dataloader) == []
        assert float(strategy.loss) == 0
        assert not any(parameter.grad is not None for parameter in strategy.model.parameters())


@EVERY
def test_forward_without_labels(name: str, vit: Vit, benchmark: Any) -> None:
    """As plugins call it on a batch of their own, before the first task too; hooks of the model fire."""
    strategy, called = make(name, vit()), []
    strategy.model.register_forward_hook(lambda *_: called.append(1))
    for classes in (0, 4):
        strategy.mbatch = torch.randn(5, 3, 16, 16), None, None
        assert strategy.forward().shape == (5, classes)
        assert called
        strategy.train(benchmark.train_stream[0])
        called.clear()


# --- evaluation -------------------------------------------------------------------------------------------------------


def points(strategy: Any, start: str) -> list[tuple[int, float]]:
    """Places and values of the curve whose name starts so."""
    found = [curve for key, curve in strategy.evaluator.get_all_metrics().items() if key.startswith(start)]
    assert len(found) <= 1
    return [pair for x, y in found for pair in zip(x, y, strict=True)]


@pytest.mark.parametrize("name", TRAINED)
def test_periodic_evaluation(name: str, vit: Vit, benchmark: Any) -> None:
    """Never; before and after; after each epoch; after every second iteration, and both ends."""
    for every, mode in ((-1, "epoch"), (0, "epoch"), (1, "epoch"), (2, "iteration")):
        evaluator = measured(accuracy_metrics(stream=True))
        strategy = make(name, vit(), evaluator=evaluator, eval_every=every, peval_mode=mode)
        strategy.train(benchmark.train_stream[0])
        found, epochs = points(strategy, "Top1_Acc_Stream/eval_phase/train_stream"), strategy.clock.train_exp_epochs
        if every == -1:
            assert not found
            continue
        places = [0, 2 * epochs] if every == 0 else list(range(0, 2 * epochs + 1, 2))
        # Avalanche counts epochs of train_epochs to know whether the last one was evaluated; by iteration it does twice
        assert sorted({x for x, _ in found}) == places
        assert len(found) == len(places) + (mode == "iteration"), (every, mode)


@EVERY
def test_streams_of_evaluation(name: str, vit: Vit, benchmark: Any) -> None:
    """Experiences are grouped by the name of their stream, whatever they come as."""
    test, train = benchmark.test_stream, benchmark.train_stream
    for streams in ([test, train], [*test, *train], [test[0], train[0], test[1], train[1]]):
        strategy = make(name, vit(), evaluator=measured(accuracy_metrics(stream=True, experience=True)), eval_every=0)
        last = strategy.train(train[0], eval_streams=list(streams))
        for stream in ("test_stream", "train_stream"):
            assert len(points(strategy, f"Top1_Acc_Stream/eval_phase/{stream}")) == 2
            assert sum(f"Top1_Acc_Exp/eval_phase/{stream}" in key for key in last) == 2


@EVERY
def test_curves_have_a_point_where_they_were_measured(name: str, vit: Vit, benchmark: Any) -> None:
    """One for each epoch and batch of training, at the iteration of that moment, and one for each evaluation."""
    evaluator = measured(accuracy_metrics(minibatch=True, epoch=True, stream=True), loss_metrics(epoch=True))
    strategy = make(name, vit(), evaluator=evaluator)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    iterations = strategy.clock.train_iterations
    batches = points(strategy, "Top1_Acc_MB/train_phase")
    assert [x for x, _ in batches] == list(range(iterations))
    accuracies, losses = points(strategy, "Top1_Acc_Epoch/train_phase"), points(strategy, "Loss_Epoch/train_phase")
    assert [x for x, _ in accuracies] == [x for x, _ in losses]
    assert len(points(strategy, "Top1_Acc_Stream/eval_phase")) == 2
    if accuracies:
        first = accuracies[0][0]
        assert accuracies[0][1] == pytest.approx(sum(y for x, y in batches if x < first) / first)


@EVERY
def test_a_stream_that_is_not_whole(name: str, vit: Vit, benchmark: Any) -> None:
    """With ``strict_checks`` the evaluator refuses a stream that is not the one of before, and all goes on."""
    strategy = make(name, vit(), evaluator=measured(accuracy_metrics(stream=True), strict_checks=True), eval_every=0)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        whole = strategy.eval(benchmark.test_stream)
    with pytest.raises(ValueError, match="stream"):
        strategy.eval(benchmark.test_stream[:1])
    assert strategy.eval(benchmark.test_stream) == whole


@EVERY
def test_loggers_write_what_was_measured(name: str, vit: Vit, benchmark: Any, tmp_path: Path) -> None:
    """CSVLogger, TensorboardLogger, and a TextLogger that is set after construction."""
    files = CSVLogger(log_folder=str(tmp_path / "csv"))
    boards = TensorboardLogger(str(tmp_path / "boards"))
    metrics = accuracy_metrics(epoch=True, experience=True), loss_metrics(epoch=True, experience=True)
    evaluator = measured(*metrics, loggers=[files, boards])
    text = io.StringIO()
    strategy = make(name, vit(), evaluator=evaluator)
    strategy.evaluator.loggers = [*evaluator.loggers, TextLogger(text)]
    for experience in benchmark.train_stream:
        strategy.train(experience)
        last = strategy.eval(benchmark.test_stream)
    files.close()
    boards.writer.close()
    with (tmp_path / "csv" / "eval_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = [value for key, value in last.items() if key.startswith("Top1_Acc_Exp/eval_phase/test_stream")]
    assert [float(row["eval_accuracy"]) for row in rows[-2:]] == pytest.approx(wanted, abs=1e-4)
    with (tmp_path / "csv" / "training_results.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == len(points(strategy, "Top1_Acc_Epoch/train_phase"))
    assert list((tmp_path / "boards").glob("events*"))
    assert text.getvalue().count("Top1_Acc_Exp/eval_phase") == 4


# --- plugins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_stop_training_ends_a_phase(name: str, vit: Vit, benchmark: Any) -> None:
    """At the next batch; phases to come, and the next experience, are trained, and the model answers."""

    class Stop(avalanche.SupervisedPlugin[Any]):
        def after_training_iteration(self, strategy: Any, **_: Any) -> None:
            if strategy.clock.train_epoch_iterations == 0:
                strategy.stop_training()

    epochs: Counter[int] = Counter()

    class Epochs(avalanche.SupervisedPlugin[Any]):
        def before_training_iteration(self, strategy: Any, **_: Any) -> None:
            epochs[strategy.clock.train_exp_counter] += 1

    strategy = make(name, vit(), plugins=[Stop(), Epochs()])
    phases = Counter[int]()
    asked = strategy.phases

    def counted(task: int) -> Any:
        for phase in asked(task):
            phases[task] += 1
            yield phase

    strategy.phases = counted
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert epochs == phases, "one batch of each phase"
    assert len(strategy.model.classes) == 4
    assert strategy.model.predict(torch.randn(3, 3, 16, 16)).isfinite().all()


@EVERY
def test_unknown_callbacks_are_warned_of(name: str, vit: Vit) -> None:
    class Unknown(avalanche.SupervisedPlugin[Any]):
        def before_lunch(self, strategy: Any, **_: Any) -> None:
            """Never called."""

    with pytest.warns(UserWarning, match=r"implements incompatible callbacks.*\n?.*before_lunch"):
        make(name, vit(), plugins=[Unknown()])


@pytest.mark.parametrize("policy", [None, ExperienceBalancedBuffer, ClassBalancedBuffer])
@EVERY
@pytest.mark.filterwarnings("ignore::UserWarning")  # that it has no effect where only the first task is trained
def test_memory_is_as_full_as_it_can_be(name: str, policy: Any, vit: Vit, benchmark: Any) -> None:
    """Of each policy after each experience; balanced over what it balances."""
    memory = avalanche.ReplayPlugin(mem_size=8, storage_policy=None if policy is None else policy(max_size=8))
    strategy = make(name, vit(), plugins=[memory])
    for seen, experience in enumerate(benchmark.train_stream, start=1):
        strategy.train(experience)
        sizes = [len(buffer) for buffer in memory.storage_policy.buffer_datasets]
        assert sum(sizes) == 8
        if policy is not None:
            assert sizes == [8 // (2 * seen)] * 2 * seen if policy is ClassBalancedBuffer else [8 // seen] * seen


def test_a_schedule_that_would_not_begin_anew_is_refused(vit: Vit) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for option in ("reset_scheduler", "reset_lr"):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        plugin = avalanche.LRSchedulerPlugin(schedule, **{option: False})
        with pytest.raises(ConfigError, match=f"LRSchedulerPlugin cannot have .*{option}=False.*: leave them out"):
            make("mos", vit(), optimizer=optimizer, plugins=[plugin])


@EVERY
def test_a_plugin_that_is_added_later_is_refused_at_the_next_call(name: str, vit: Vit, benchmark: Any) -> None:
    """Nothing of the model changes, and without it all goes on."""
    strategy = make(name, vit())
    strategy.train(benchmark.train_stream[0])
    before, plugin = weights(strategy), avalanche.GDumbPlugin()
    strategy.plugins.append(plugin)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{type(strategy).__name__} cannot use GDumbPlugin: it puts"):
            strategy.train(benchmark.train_stream[1])
    assert same(weights(strategy), before)
    strategy.plugins.remove(plugin)
    strategy.train(benchmark.train_stream[1])
    plain = make(name, vit())
    plain.train(benchmark.train_stream)
    assert same(weights(strategy), weights(plain))


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (lambda: avalanche.EarlyStoppingPlugin(1, "train_stream"), "pass eval_every=1, peval_mode='epoch'"),
        (
            lambda: avalanche.LRSchedulerPlugin(
                torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1)
            ),
            "LRSchedulerPlugin was added to a LAE that is there already: pass it in plugins=",
        ),
        (lambda: avalanche.LwFPlugin(), "with cached_views LAE trains on hidden states"),
    ],
    ids=["early stopping", "schedule", "images"],
)
def test_a_plugin_that_is_added_later_is_checked_in_every_way(
    plugin: Callable[[], Any], message: str, vit: Vit, benchmark: Any
) -> None:
    strategy: Any = LAE(vit(), cached_views=1, evaluator=measured(accuracy_metrics(stream=True)))
    strategy.plugins.append(plugin())
    with pytest.raises(ConfigError, match=message):
        strategy.train(benchmark.train_stream[0])
    assert not strategy.model.classes


def test_a_plugin_that_is_added_later_without_effect_is_named_once(vit: Vit, benchmark: Any) -> None:
    strategy = make("simple_cil", vit())
    strategy.plugins.append(avalanche.ReplayPlugin(mem_size=4))
    with pytest.warns(UserWarning, match="SimpleCIL trains nothing here, so ReplayPlugin has no effect") as found:
        strategy.train(benchmark.train_stream)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SimpleCIL")
        strategy.train(benchmark.train_stream)
    assert [each.filename for each in found if "SimpleCIL" in str(each.message)] == [__file__]


@pytest.mark.parametrize("cls", [MOS, Sequential])
def test_a_plugin_that_is_added_later_acts_as_one_that_was_given(cls: Any, vit: Vit, benchmark: Any) -> None:
    """Behind Avalanche's clock EWC would keep the first experience under the number of the second."""
    found = []
    for given in (True, False):
        strategy = cls(vit(), train_epochs=2, train_mb_size=6, evaluator=None, seed=0)
        if given:
            plugins = [avalanche.EWCPlugin(50.0)]
            strategy = cls(vit(), train_epochs=2, train_mb_size=6, evaluator=None, seed=0, plugins=plugins)
        else:
            strategy.plugins.append(avalanche.EWCPlugin(50.0))
        strategy.train(benchmark.train_stream)
        assert strategy.plugins[-1] is strategy.clock
        found.append(weights(strategy))
    plain = cls(vit(), train_epochs=2, train_mb_size=6, evaluator=None, seed=0)
    plain.train(benchmark.train_stream)
    assert same(*found)
    assert not same(found[0], weights(plain))


# --- data -------------------------------------------------------------------------------------------------------------


@EVERY
def test_each_side_has_its_transform(name: str, vit: Vit) -> None:
    """Batches of training come through that of training; evaluation and class statistics through that of evaluation."""
    labels, seen = torch.arange(4).repeat(6), {"train": 0, "eval": 0}
    data: Any = TensorDataset(torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)), labels)
    data.targets = labels.tolist()

    def marked(side: str, value: float) -> Callable[[Tensor], Tensor]:
        def transform(x: Tensor) -> Tensor:
            seen[side] += 1
            marked_x = x.clone()
            marked_x[0, 0, 0] = value
            return marked_x

        return transform

    both = nc_benchmark(
        data, data, 2, task_labels=False, train_transform=marked("train", 3.0), eval_transform=marked("eval", -3.0)
    )
    corners: dict[bool, set[float]] = {True: set(), False: set()}

    class Corners(avalanche.SupervisedPlugin[Any]):
        def before_training_iteration(self, strategy: Any, **_: Any) -> None:
            corners[True] |= set(strategy.mb_x[:, 0, 0, 0].tolist())

        def before_eval_iteration(self, strategy: Any, **_: Any) -> None:
            corners[False] |= set(strategy.mb_x[:, 0, 0, 0].tolist())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = make(name, vit(), plugins=[Corners()])
    strategy.train(both.train_stream)
    trained = seen["train"]
    strategy.eval(both.test_stream)
    assert corners == {True: {3.0} if strategy.trains else set(), False: {-3.0}}
    assert seen["train"] == trained, "evaluation takes none of training"
    assert seen["eval"] >= 24


@pytest.mark.parametrize("name", [name for name in strategies.names() if name != "mos"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that the first experience is small
def test_parts_that_know_their_whole_are_experiences_too(name: str, vit: Vit, benchmark: Any) -> None:
    """Avalanche adapts a model to the first of them alone, which may not have all classes."""
    found = []
    for boundaries in (False, True):
        strategy = make(name, vit(), train_epochs=1) if name != "simple_cil" else make(name, vit())
        parts = split_online_stream(
            benchmark.train_stream, experience_size=4, shuffle=False, access_task_boundaries=boundaries
        )
        strategy.train(parts)
        found.append(weights(strategy))
        assert sorted(strategy.model.classes) == [0, 1, 2, 3]
    assert same(*found)
