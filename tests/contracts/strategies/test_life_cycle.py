"""What every registered strategy keeps, on every style of Avalanche experience."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    class_accuracy_metrics,
    confusion_matrix_metrics,
    forgetting_metrics,
    loss_metrics,
    timing_metrics,
)
from avalanche.logging import InteractiveLogger, TextLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from cl_adapters.config import build, to_plain
from cl_adapters.strategies.base import strategies


@pytest.fixture(params=strategies.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stir() -> None:
    """Leave the global generators somewhere else."""
    torch.manual_seed(int(torch.randint(1000, (1,))) + 1)
    np.random.seed(int(torch.randint(1000, (1,))))
    random.seed(int(torch.randint(1000, (1,))))


def test_configuration_is_typed_and_survives_json(name: str, lab: Any) -> None:
    cls: Any = strategies.get(name)
    assert cls.summary and "\n" not in cls.summary
    assert cls.__doc__
    assert all(field.kw_only for field in dataclasses.fields(cls.Config))
    assert vars(cls.Config)["__dataclass_params__"].frozen
    strategy = lab.make(name)
    assert build(cls.Config, to_plain(strategy.config)) == strategy.config
    assert strategies.name_of(strategy) == name


def test_learns_every_style_of_experience(name: str, lab: Any) -> None:
    """Sets or lists of classes or only targets, gaps in the labels, unequal tasks; heads grow as classes come."""
    for style in lab.styles:
        benchmark, strategy = lab.benchmark(style), lab.make(name)
        known: list[int] = []
        for experience in benchmark.train_stream:
            strategy.train(experience)
            new = sorted({int(item[1]) for item in experience.dataset})
            known += new
            assert strategy.model.classes == known, style
            logits = strategy.model.predict(lab.probe())
            assert logits.shape == (9, len(known))
            assert logits.isfinite().all()
            strategy.eval(benchmark.test_stream)
        assert strategy.model.task_of_column.tolist() == [0, 0, 1, 2, 2]
        right = total = 0
        for experience in benchmark.test_stream:
            x = torch.stack([item[0] for item in experience.dataset])
            y = [int(item[1]) for item in experience.dataset]
            answers = [known[column] for column in strategy.model.predict(x).argmax(1).tolist()]
            right, total = right + sum(a == b for a, b in zip(answers, y, strict=True)), total + len(y)
        assert right / total > 0.2, f"{style}: no better than guessing among 5 classes"


def test_styles_give_the_same_model(name: str, lab: Any) -> None:
    """The same images as sets and as targets only: the style itself decides nothing."""
    models = []
    for style in ("sets", "targets only"):
        strategy = lab.make(name)
        strategy.train(lab.benchmark(style).train_stream)
        models.append(lab.state(strategy))
    assert not lab.differing(*models)


def test_evaluating_changes_nothing_and_repeats_itself(name: str, lab: Any) -> None:
    """Raw logits, every tensor, the modes, what trains, and the global random states: bit for bit."""
    benchmark, strategy = lab.benchmark("sets"), lab.make(name)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    outputs: list[Tensor] = []

    class Keep(SupervisedPlugin):
        def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
            outputs.append(strategy.mb_output.clone())

    def evaluate(stream: Any) -> list[Tensor]:
        outputs.clear()
        strategy.eval(stream)
        return list(outputs)

    strategy.plugins.append(Keep())
    before, first, optimizer = lab.state(strategy), strategy.model.predict(lab.probe()), _plain(strategy.optimizer)
    once = evaluate(benchmark.test_stream)
    evaluate(benchmark.test_stream[0])
    twice = evaluate(benchmark.test_stream)
    assert not lab.differing(before, lab.state(strategy))
    assert torch.equal(strategy.model.predict(lab.probe()), first)
    assert len(once) == len(twice) >= 3
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert _plain(strategy.optimizer) == optimizer


def _plain(optimizer: torch.optim.Optimizer) -> str:
    return repr([(key, value.sum().item()) for p in optimizer.state.values() for key, value in p.items()])


def test_predictions_do_not_depend_on_batch_size_order_or_neighbours(name: str, lab: Any) -> None:
    benchmark, strategy = lab.benchmark("lists"), lab.make(name)
    strategy.train(benchmark.train_stream)
    x, model = torch.cat([lab.probe(), lab.images(range(20), 1, 3, noise=0).images]), strategy.model
    whole = model.predict(x, batch=len(x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for other in (model.predict(x, batch=1), model.predict(x, batch=7), model.predict(x[order])[order.argsort()]):
        assert torch.allclose(other, whole, atol=1e-5)
        assert torch.equal(other.argmax(1), whole.argmax(1))
    assert torch.allclose(model.predict(torch.cat([x[:3], 5 * torch.randn(6, 3, 16, 16)]))[:3], whole[:3], atol=1e-5)


def test_backbone_and_finished_adapters_keep_their_bytes(name: str, lab: Any) -> None:
    benchmark, strategy = lab.benchmark("sets"), lab.make(name)
    backbone = {key: value.clone() for key, value in strategy.model.backbone.state_dict().items()}
    finished: list[dict[str, Tensor]] = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        now = strategy.model.backbone.state_dict()
        assert all(torch.equal(value, now[key]) for key, value in backbone.items())
        assert not any(p.requires_grad for p in strategy.model.backbone.parameters())
        bank = strategy.model.bank
        if bank is None or not strategy.frozen_after_task:
            continue
        for slot, before in enumerate(finished):
            assert all(torch.equal(value, before[key]) for key, value in bank.export(slot).items())
        finished = [bank.export(slot) for slot in range(bank.num_slots)]
        assert not any(p.requires_grad for slot in range(bank.num_slots) for p in bank.slot_parameters(slot))
    if strategy.model.bank is not None:
        new = strategy.model.bank.export(strategy.model.num_slots - 1)
        assert any(value.any() for key, value in new.items() if key.endswith("up")), "the newest one was trained"


def test_evaluations_in_between_and_the_random_state_around_change_nothing(name: str, lab: Any) -> None:
    """eval_every -1, 0 and 1 with streams, explicit evaluations and stirred generators: bit-identical models."""
    states = []
    for every, explicit in ((-1, False), (-1, True), (0, False), (1, True)):
        benchmark, strategy = lab.benchmark("sets"), lab.make(name, eval_every=every)
        for experience in benchmark.train_stream:
            if explicit:
                stir()
                strategy.eval(benchmark.test_stream)
            before = lab.state(strategy)["rng"]
            strategy.train(experience, eval_streams=[benchmark.test_stream] if every >= 0 else None)
            assert not lab.differing({"rng": before}, {"rng": lab.state(strategy)["rng"]}), (
                "training leaves them as they were"
            )
        states.append({key: value for key, value in lab.state(strategy).items() if key != "rng"})
    assert not lab.differing(states[0], states[1])
    assert not lab.differing(states[0], states[2])
    assert not lab.differing(states[0], states[3])


def test_another_seed_is_another_training(name: str, lab: Any) -> None:
    """And the same seed the same one; strategies without anything random are exempt by nature."""
    models = []
    for seed in (5, 5, 6):
        strategy = lab.make(name, seed=seed)
        strategy.train(lab.benchmark("sets").train_stream[0])
        models.append(strategy.model.predict(lab.probe()))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


@pytest.mark.parametrize("style", ["sets", "lists"])
def test_metrics_and_loggers(name: str, lab: Any, style: str) -> None:
    """Avalanche's evaluator with its usual metrics; also before the first task, and for classes not seen yet."""
    text, buffer = io.StringIO(), io.StringIO()
    interactive = InteractiveLogger()
    interactive.file = buffer
    evaluator = EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True, trained_experience=True),
        loss_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        class_accuracy_metrics(experience=True) if style == "lists" else [],  # it asks for items with a task label
        forgetting_metrics(experience=True, stream=True),
        confusion_matrix_metrics(stream=True, save_image=False),
        timing_metrics(epoch=True),
        loggers=[interactive, TextLogger(text)],
    )
    benchmark = lab.benchmark(style)
    strategy = lab.make(name, evaluator=evaluator, eval_every=0)
    start = strategy.eval(benchmark.test_stream)
    assert all(np.isnan(value) for key, value in start.items() if "Loss" in key), "no class is known, so no loss either"
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        found = strategy.eval(benchmark.test_stream)
    accuracy = next(value for key, value in found.items() if key.startswith("Top1_Acc_Stream/eval_phase"))
    right = total = 0
    for experience in benchmark.test_stream:
        x = torch.stack([item[0] for item in experience.dataset])
        columns = strategy.model.predict(x).argmax(1)
        answers = torch.tensor(strategy.model.classes)[columns]
        right += int((answers == torch.tensor([int(item[1]) for item in experience.dataset])).sum())
        total += len(x)
    assert accuracy == pytest.approx(right / total), "what Avalanche counts is what the model says"
    confusion = next(value for key, value in found.items() if key.startswith("ConfusionMatrix"))
    assert int(torch.as_tensor(confusion).sum()) == total
    assert all(np.isfinite(value) for key, value in found.items() if "Loss" in key)
    assert any("Forgetting" in key for key in found)
    assert "Top1_Acc_Stream" in text.getvalue()
    assert "-- >> Start of training phase << --" in buffer.getvalue() + text.getvalue()


def test_before_the_first_task(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    before = lab.state(strategy)
    strategy.eval(lab.benchmark("sets").test_stream)
    assert not lab.differing(before, lab.state(strategy)), "evaluation never grows a model"


def test_deepcopy_goes_its_own_way(name: str, lab: Any) -> None:
    """A copy learns the rest; the original does not notice, and then learns the same."""
    benchmark, strategy = lab.benchmark("sets"), lab.make(name)
    strategy.train(benchmark.train_stream[0])
    before = lab.state(strategy)
    twin = copy.deepcopy(strategy)
    twin.train(benchmark.train_stream[1])
    twin.train(benchmark.train_stream[2])
    assert not lab.differing(before, lab.state(strategy))
    strategy.train(benchmark.train_stream[1])
    strategy.train(benchmark.train_stream[2])
    assert not lab.differing(lab.state(twin), lab.state(strategy))


def test_plugins_of_avalanche_see_the_usual_life_cycle(name: str, lab: Any) -> None:
    """Callbacks come in Avalanche's order; the optimizer is one object for life."""
    calls: list[str] = []

    class Spy(SupervisedPlugin):
        def __getattribute__(self, key: str) -> Any:
            if key.startswith(("before_", "after_")) and "eval" not in key:
                return lambda strategy, **kwargs: calls.append(key)
            return super().__getattribute__(key)

    strategy = lab.make(name, plugins=[Spy()])
    optimizer = strategy.optimizer
    strategy.train(lab.benchmark("sets").train_stream[0])
    assert strategy.optimizer is optimizer
    assert calls[:2] == ["before_training", "before_train_dataset_adaptation"]
    assert calls[-2:] == ["after_training_exp", "after_training"]
    for key in ("training_epoch", "training_iteration", "forward", "backward", "update"):
        assert calls.count(f"before_{key}") == calls.count(f"after_{key}")


def test_progress_calls_the_callback(name: str, lab: Any) -> None:
    from cl_adapters.strategies.config import TrainingConfig

    calls: list[tuple[str, int, int]] = []
    strategy = lab.make(name, progress=lambda *step: calls.append(step))
    strategy.train(lab.benchmark("sets").train_stream[0])
    assert bool(calls) == isinstance(strategy.config, TrainingConfig), "whoever trains says how far it is"
    for phase, done, total in calls:
        assert 0 < done <= total, phase
    assert not calls or calls[-1][1] == calls[-1][2]


def test_plugins_and_metrics_read_logits_by_label(name: str, lab: Any) -> None:
    """Label-wide output in training too; reading it changes nothing."""
    from avalanche.core import SupervisedPlugin

    shapes: list[tuple[bool, int, int]] = []

    class Reader(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            self.look(strategy)

        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.look(strategy)

        def look(self, strategy: Any) -> None:
            width = max(*strategy.model.classes, int(strategy.mb_y.max())) + 1
            unseen = [label for label in range(width) if label not in strategy.model.classes]
            shapes.append((strategy.is_training, strategy.mb_output.shape[1], width))
            assert bool((strategy.mb_output[:, unseen] == -1000).all())

    states = []
    for plugins in ([], [Reader()]):
        strategy, benchmark = lab.make(name, plugins=plugins), lab.benchmark("sets")
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
        strategy.eval(benchmark.test_stream)
        states.append(lab.state(strategy))
    assert all(found == width for _, found, width in shapes)
    assert any(not training for training, _, _ in shapes)
    assert not lab.differing(*states)
