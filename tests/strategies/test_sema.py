"""SEMA on streams that make it grow: going on from a save, what evaluation runs, streams whose looks come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cl_adapters.errors import ConfigError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import SEMA

TASKS = ([3, 7], [1], [0, 5], [2, 9], [4])


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images float32 [3, 16, 16]: a colour per class, under a pattern per look that changes every pixel."""

    def __init__(self, labels: list[int], look: int) -> None:
        self.targets = [label for label in labels for _ in range(8)]
        generator = torch.Generator().manual_seed(sum(labels))
        colours = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        pattern = 3.0 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(100 + look))
        noise = 0.3 * torch.randn(len(self.targets), 3, 16, 16, generator=generator)
        self.images = 0.5 * colours[torch.tensor(self.targets)] + noise + pattern

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + 0.05 * torch.randn(3, 16, 16), self.targets[index]


def stream(looks: list[int]) -> Any:
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    def data(task: list[int], look: int) -> Any:
        pictures = Pictures(task, look)
        return AvalancheDataset([pictures], data_attributes=[DataAttribute(pictures.targets, "targets")])

    parts = [data(task, look) for task, look in zip(TASKS, looks, strict=False)]
    return with_classes_timeline(benchmark_from_datasets(train=parts, test=parts))


@pytest.fixture
def make(tiny_vit: Callable[..., nn.Module]) -> Callable[..., Any]:
    """A small SEMA with two expandable blocks; ``model`` to go on from."""

    def build(model: nn.Module | None = None, **options: Any) -> Any:
        settings = {
            "descriptor_dim": 4,
            "descriptor_epochs": 4,
            "train_epochs": 2,
            "train_mb_size": 4,
            "last_blocks": 2,
        }
        more = {"scan_mb_size": 16, "lr": 0.02, "buffer": 50, "seed": 3, "evaluator": None, "threshold": 3.0}
        network = model or tiny_vit(width=16, heads=2, img_size=16, depth=3)
        return SEMA(model=network, **{**settings, **more, **options})

    return build


def slots(strategy: Any) -> dict[int, tuple[int, ...]]:
    return {block: strategy.mixture.slots(block) for block in strategy.mixture.blocks}


@pytest.mark.parametrize("views", [0, 2])
def test_going_on_from_a_save_grows_as_without_one(make: Any, tmp_path: Path, views: int) -> None:
    """Records are saved: without them every score would be 0 and nothing would ever expand."""
    experiences = stream([0, 1, 2]).train_stream
    straight = make(cached_views=views, threshold=1.5)
    growth = []
    for experience in experiences:
        straight.train(experience)
        growth.append(list(straight.expansions))
    assert growth[1], "the second task made it grow"
    assert growth[2], "and so did the third"
    stopped = make(cached_views=views, threshold=1.5)
    stopped.train(experiences[0])
    for task in (1, 2):
        stopped.model.save(tmp_path / str(task))
        loaded = AdapterModel.load(tmp_path / str(task), stopped.model.backbone)
        stopped = make(loaded, cached_views=views, threshold=1.5)
        stopped.train(experiences[task])
        assert stopped.expansions == growth[task]
    assert slots(stopped) == slots(straight)
    first, second = straight.model.state_dict(), stopped.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert stopped.model.task_of_slot == straight.model.task_of_slot


def test_grows_where_the_look_is_new_and_not_where_it_comes_back(make: Any) -> None:
    strategy = make()
    grown = []
    for experience in stream([0, 1, 0, 1, 0]).train_stream:
        strategy.train(experience)
        grown.append(len(strategy.expansions))
    assert grown[0] == 0
    assert grown[1] > 0
    assert grown[2:] == [0, 0, 0]
    assert strategy.model.num_slots == 1 + grown[1]
    assert all(found.score > found.threshold == 3.0 for found in strategy.expansions)


def test_evaluation_and_prediction_run_no_descriptor(make: Any) -> None:
    strategy = make()
    data = stream([0, 1])
    for experience in data.train_stream:
        strategy.train(experience)
    calls: list[nn.Module] = []
    for block in strategy.descriptors.blocks:
        for slot in strategy.descriptors.slots(block):
            strategy.descriptors.descriptor(block, slot).register_forward_hook(lambda m, args, out: calls.append(m))
    strategy.eval(data.test_stream)
    strategy.model.predict(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert not calls
    strategy.descriptors.score(strategy.descriptors.blocks[0], torch.zeros(1, 16))
    assert calls, "the hooks would have seen it"


def test_any_set_of_blocks_may_be_expandable(make: Any) -> None:
    strategy = make(expandable=(0, 2), threshold=0.01)
    for experience in stream([0, 1]).train_stream:
        strategy.train(experience)
    assert {block: len(found) for block, found in slots(strategy).items()} == {0: 2, 2: 2}
    with pytest.raises(ConfigError, match=r"expandable blocks \[7\] have no adapters; blocks with: \[0, 1, 2\]"):
        make(expandable=(1, 7))
    with pytest.raises(ConfigError, match=r"expandable blocks \[0\] have no adapters; blocks with: \[1, 2\]"):
        make(expandable=(0,), blocks=(1, 2))


def test_only_the_head_learns_where_nothing_is_new(make: Any) -> None:
    strategy = make(threshold=1e6)
    first, second = stream([0, 1]).train_stream
    strategy.train(first)
    before = {key: value.clone() for key, value in strategy.model.state_dict().items()}
    strategy.train(second)
    changed = {key for key, value in strategy.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}
    assert strategy.trainable_parameters == 17 * 3


def test_a_model_of_another_strategy_is_refused(make: Any, tiny_vit: Callable[..., nn.Module]) -> None:
    from cl_adapters.errors import ClAdaptersError
    from cl_adapters.strategies import Sequential

    other = Sequential(model=tiny_vit(width=16, heads=2, img_size=16, depth=3), evaluator=None, train_epochs=1)
    experiences = stream([0, 1]).train_stream
    other.train(experiences[0])
    with pytest.raises(ClAdaptersError, match="no part 'mixture'"):
        make(other.model).train(experiences[1])


def test_sites_of_different_widths_in_one_block_are_refused(make: Any) -> None:
    """One router cannot read both; blocks that differ from one another are fine."""
    mixed = {"type": "lora", "rank": 2, "targets": ["up", "down"]}
    message = r"block 1 read inputs of different widths: up 16, down 64\. Choose sites \(of LoRA: targets\)"
    with pytest.raises(ConfigError, match=message):
        make(adapter=mixed)
    strategy = make(adapter=mixed | {"targets": ["down"]}, threshold=0.01)
    for experience in stream([0, 1]).train_stream:
        strategy.train(experience)
    assert strategy.mixture.widths == {1: 64, 2: 64}
    assert len(strategy.expansions) > 0, "and such a width is routed and scanned like any other"
