"""Bad input to every registered strategy: one clear error, or a documented behaviour, and nothing half done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from torch import Tensor, nn
from torch.utils.data import Dataset

from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, IncompatibleBackbone, TrainingDiverged
from cl_adapters.strategies.base import strategies
from cl_adapters.strategies.config import TrainingConfig


@pytest.fixture(params=strategies.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trains(name: str) -> bool:
    """Whether the strategy has adapters and a loss."""
    return issubclass(strategies.get(name).Config, TrainingConfig)


class Plain(Dataset[tuple[Tensor, int]]):
    def __init__(self, x: Tensor, targets: list[Any]) -> None:
        self.x, self.targets = x, targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def experience_of(lab: Any, x: Tensor, labels: list[Any], classes: list[int] | None = None) -> Any:
    (experience,) = benchmark_from_datasets(train=[lab.experience_data(Plain(x, labels))]).train_stream
    if classes is not None:
        experience.classes_in_this_experience = classes
    return experience


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- options -------------------------------------------------------------------------------------------------------


def test_unknown_option_gets_a_suggestion(name: str, lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"eval_mb_sizes; did you mean 'eval_mb_size'"):
        lab.make(name, eval_mb_sizes=3)
    with pytest.raises(ConfigError, match=r"evaluater; did you mean 'evaluator'"):
        lab.make(name, evaluater=None)
    with pytest.raises(ConfigError, match=r"eval_mb_size: input should be a valid integer.*'three'"):
        lab.make(name, eval_mb_size="three")
    with pytest.raises(ConfigError, match="batch sizes must be at least 1"):
        lab.make(name, eval_mb_size=0)
    with pytest.raises(TypeError, match="positional"):
        strategies.get(name)(lab.vit(), None, None, 3)  # type: ignore[arg-type, call-arg]


def test_nested_options_are_checked_too(lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown option adapter\.botleneck; did you mean 'bottleneck'"):
        lab.make("mos", adapter={"botleneck": 3})
    with pytest.raises(ConfigError, match=r"alignment\.epoch; did you mean 'epochs'"):
        lab.make("mos", alignment={"epoch": 3})
    with pytest.raises(ConfigError, match=r"merge.*'paper' or 'released'.*'papers'"):
        lab.make("mos", merge="papers")
    with pytest.raises(ConfigError, match="train_epochs must be at least 1, got 0"):
        lab.make("mos", train_epochs=0)
    with pytest.raises(ConfigError, match="lr must be positive"):
        lab.make("mos", lr=0)


def test_configuration_of_another_strategy(name: str, lab: Any) -> None:
    class Other:
        pass

    with pytest.raises(ConfigError, match=f"{strategies.get(name).__name__} takes a .*Config, got Other"):
        lab.make(name, config=Other())


# --- backbones ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's encoder without blocks."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 12)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.linear(x.flatten(1)).tanh()
        return features


def test_own_module_as_a_backbone(name: str, lab: Any) -> None:
    """Without known sites: fine where no adapter is needed, else an error that says how to give them."""
    if trains(name):
        with pytest.raises(IncompatibleBackbone, match=r"no known adapter sites in Own.*sites=\[Site"):
            lab.make(name, model=Own())
        return
    strategy = lab.make(name, model=Own())
    for experience in lab.benchmark("sets").train_stream:
        strategy.train(experience)
    assert strategy.model.predict(lab.probe()).shape == (9, 5)


def test_own_module_with_sites(name: str, lab: Any) -> None:
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.sites.sites import Site, Tap

    class Tokens(nn.Module):
        num_features = 12

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.ffn = nn.Conv2d(3, 12, 8, stride=8), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            tokens: Tensor = self.embed(x).flatten(2).mT
            total: Tensor = tokens + self.ffn(tokens).tanh()
            return total.mean(1)

    site = Site("ffn", 0, "ffn_parallel", 12, Tap("ffn", "in"), Tap("ffn", "out"))
    backbone = FrozenBackbone.wrap(Tokens(), sites=[site])
    adapter = {"adapter": {"bottleneck": 4, "place": "ffn", "mode": "parallel"}} if trains(name) else {}
    strategy = lab.make(name, model=backbone, **adapter)
    for experience in lab.benchmark("sets").train_stream:
        strategy.train(experience)
    assert strategy.model.predict(lab.probe()).isfinite().all()


def test_leaf_that_requires_a_gradient_is_caught(name: str, lab: Any) -> None:
    """Below the first adapter it would double the cost of a step, and train what must stay as it is."""
    strategy = lab.make(name)
    encoder = strategy.model.backbone.encoder
    encoder.prompt = nn.Parameter(torch.zeros(16))
    with pytest.raises(ClAdaptersError, match="'prompt' requires a gradient"):
        strategy.train(lab.benchmark("sets").train_stream[0])
    assert strategy.model.classes == []
    encoder.prompt.requires_grad_(False)
    strategy.train(lab.benchmark("sets").train_stream[0])
    assert strategy.model.classes == [3, 7]


# --- experiences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), "cat", None, 2**64, -1, 1j, [1]])
def test_labels_that_are_no_class(name: str, lab: Any, label: Any) -> None:
    """Refused before anything grows, with the first such sample; training goes on as if it had not been tried."""
    strategy = lab.make(name)
    before = lab.state(strategy)
    message = r"training sample 2 has label .*; labels are whole numbers from 0 to 2\*\*63 - 1: number the classes"
    with pytest.raises(DataError, match=message):
        strategy.train(experience_of(lab, images(4), [1, 1, label, 2]))
    assert not lab.differing(before, lab.state(strategy))
    if label != [1]:
        with pytest.raises(DataError, match=r"a class of this experience has label .*; labels are whole numbers"):
            strategy.train(experience_of(lab, images(4), [1, 1, 2, 2], classes=[1, 2, label]))
    strategy.train(lab.benchmark("sets").train_stream[0])


def test_labels_of_other_types_that_say_the_same(name: str, lab: Any) -> None:
    """Whole floats, numpy numbers, tensors and bools were taken always."""
    found = []
    for kind in (int, float, np.int64, np.float32, torch.tensor, bool):
        strategy = lab.make(name)
        strategy.train(experience_of(lab, images(4), [kind(label) for label in (0, 0, 1, 1)]))
        found.append(strategy.model.predict(lab.probe()))
        assert strategy.model.classes == [0, 1]
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_labels_of_the_samples_that_contradict_the_targets(name: str, lab: Any) -> None:
    """What the data set says class 1 and 2 are, comes as 1 and 7, or as 1 and 1.5."""

    class Lying(Plain):
        wrong: Any

        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            return self.x[index], self.wrong if self.targets[index] == 2 else type(self.wrong)(1)

    for wrong, message in ((7, "came with label 7, but the classes so far are"), (1.5, r"has label 1\.5; labels are")):
        data = Lying(images(4), [1, 1, 2, 2])
        data.wrong = wrong
        (experience,) = benchmark_from_datasets(train=[lab.experience_data(data)]).train_stream
        with pytest.raises(DataError, match=message):
            lab.make(name).train(experience)


def test_class_that_comes_back(name: str, lab: Any) -> None:
    """With a wrong label it is refused before anything grows; training goes on as if it had not been tried."""
    stream = lab.benchmark("sets").train_stream
    strategy, calm = lab.make(name), lab.make(name)
    for s in (strategy, calm):
        s.train(stream[0])
    before = lab.state(strategy)
    with pytest.raises(DataError, match=r"does not name classes \[9\]"):
        strategy.train(experience_of(lab, images(4), [3, 3, 9, 9], classes=[3]))
    assert not lab.differing(before, lab.state(strategy))
    again = experience_of(lab, images(4), [3, 3, 9, 9])
    for s in (strategy, calm):
        s.train(again)
        s.train(stream[0])
        s.train(stream[1])
    assert strategy.model.classes == [3, 7, 9, 11]
    assert not lab.differing(lab.state(calm), lab.state(strategy))


def test_empty_experience(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    before = lab.state(strategy)
    with pytest.raises(DataError, match="no training sample"):
        strategy.train(experience_of(lab, images(0), [], classes=[1]))
    assert not lab.differing(before, lab.state(strategy))
    strategy.train(lab.benchmark("sets").train_stream[0])


def test_class_without_an_image(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    before = lab.state(strategy)
    with pytest.raises(DataError, match=r"no training sample of classes \[8\]"):
        strategy.train(experience_of(lab, images(4), [1, 1, 2, 2], classes=[1, 2, 8]))
    assert not lab.differing(before, lab.state(strategy))


def test_class_named_twice(name: str, lab: Any) -> None:
    strategy = lab.make(name)
    strategy.train(experience_of(lab, images(4), [1, 1, 2, 2], classes=[2, 1, 2]))
    assert strategy.model.classes == [1, 2]


@pytest.mark.filterwarnings("ignore:a class has one image")
def test_class_of_one_image(name: str, lab: Any) -> None:
    """Documented: its Gaussian is the ridge alone (with a warning); its prototype is the image itself."""
    strategy = lab.make(name)
    x = images(6)
    strategy.train(experience_of(lab, x[:5], [1, 2, 2, 2, 2]))
    strategy.train(experience_of(lab, x[5:], [0]))
    assert strategy.model.predict(lab.probe()).isfinite().all()
    if strategy.model.statistics is not None:
        spread = strategy.model.statistics.spreads[0]
        assert torch.equal(spread, 1e-4 * torch.eye(len(spread)))


def test_one_image_warns(lab: Any) -> None:
    with pytest.warns(UserWarning, match="one image: its covariance is the ridge alone"):
        lab.make("mos").train(experience_of(lab, images(3), [1, 2, 2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers(name: str, lab: Any, value: float) -> None:
    """Training stops at once, says where and what to do; it goes on from the task before, as if nothing had been."""
    strategy, calm = lab.make(name), lab.make(name)
    for s in (strategy, calm):
        s.train(lab.benchmark("sets").train_stream[0])
    x = images(8)
    x[5, 0, 3, 3] = value
    random_state = torch.get_rng_state()
    with pytest.raises((TrainingDiverged, DataError), match=r"finite|the loss became nan in task 1 at epoch 0"):
        strategy.train(experience_of(lab, x, [1, 1, 1, 1, 2, 2, 2, 2]))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert strategy.model.backbone.features(lab.probe()).isfinite().all()
    for s in (strategy, calm):
        s.train(lab.benchmark("sets").train_stream[1])
    assert not lab.differing(lab.state(calm), lab.state(strategy))


def test_interrupted_training_is_gone_on_from(name: str, lab: Any) -> None:
    """Ctrl-C in the middle of a task: another one is learned as if nothing had been."""
    from avalanche.core import SupervisedPlugin

    class Interrupt(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            if 11 in strategy.model.classes:
                raise KeyboardInterrupt

    strategy, calm = lab.make(name, plugins=[Interrupt()]), lab.make(name)
    stream = lab.benchmark("sets").train_stream
    for s in (strategy, calm):
        s.train(stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    for s in (strategy, calm):
        s.train(stream[2])
    assert not lab.differing(lab.state(calm), lab.state(strategy))


def test_divergence_by_the_learning_rate_says_so(lab: Any) -> None:
    strategy = lab.make("mos", lr=1e30, train_epochs=3)
    with pytest.raises(TrainingDiverged, match=r"in task 0 at epoch \d, iteration \d: lower lr \(now "):
        strategy.train(lab.benchmark("sets").train_stream[0])
