"""repeats: the looks come back in turn, the characters never do, and the looks are what the backbone notices most."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cl_adapters.backbones.encode import image_preprocessing
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.base import BenchmarkData, SampleSet
from cl_adapters.benchmarks.data.repeats import LOOKS, Look, Repeats
from cl_adapters.errors import ConfigError

SMALL = Repeats(tasks=7, classes_per_task=2, looks=3, train_per_class=2, test_per_class=1)


def looks_in(part: SampleSet, data: BenchmarkData, task: int) -> set[str]:
    """The looks that the image names of a task tell."""
    return {part.names[int(i)].split("/")[2] for i in np.flatnonzero(np.isin(part.labels, data.tasks[task]))}


def of_task(data: BenchmarkData, task: int) -> list[npt.NDArray[np.uint8]]:
    return [data.train.images[int(i)] for i in np.flatnonzero(np.isin(data.train.labels, data.tasks[task]))]


def test_looks_come_back_in_turn_and_characters_never() -> None:
    data = SMALL.load(0)
    names = [look.name for look in LOOKS]
    for part in (data.train, data.test):
        assert [looks_in(part, data, task) for task in range(7)] == [{names[task % 3]} for task in range(7)]
    assert [SMALL.look_of(task).name for task in (0, 2, 3)] == [names[0], names[2], names[0]]
    assert data.task_sizes == (2,) * 7
    characters = [re.findall(r"U\+[0-9A-F]+", name)[0] for name in data.classes]
    assert len(set(characters)) == 14
    for task, labels in enumerate(data.tasks):
        assert all(data.classes[label].endswith(f", {names[task % 3]}") for label in labels)


def test_seeds_of_order_and_images() -> None:
    data = SMALL.load(0)
    fixed = Repeats(tasks=7, classes_per_task=2, looks=3, train_per_class=2, test_per_class=1, order_seed=0)
    assert fixed.load(5).class_order == data.class_order
    assert SMALL.load(5).class_order != data.class_order
    assert not np.array_equal(fixed.load(5).train.images, data.train.images)
    same = Repeats(
        tasks=7, classes_per_task=2, looks=3, train_per_class=2, test_per_class=1, order_seed=0, image_seed=0
    )
    assert np.array_equal(same.load(5).train.images, data.train.images)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.name)
@pytest.mark.parametrize("size", [16, 32, 50])
def test_a_texture_covers_the_image_and_leaves_its_form(look: Look, size: int) -> None:
    grey = np.full((size, size, 3), 200, dtype=np.uint8)
    drawn = look.texture(grey)
    assert (drawn.shape, drawn.dtype) == (grey.shape, grey.dtype)
    assert (grey == 200).all(), "the image that came in is left alone"
    kept = (drawn == 200).mean()
    assert kept == 1 if look == LOOKS[-1] else 0.2 < kept < 0.8


def test_a_look_moves_the_features_more_than_new_characters_do() -> None:
    """Nearest mean of pooled tokens: tasks 5..9 are each closest to the task of 0..4 that has their look, by far."""
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    transform = image_preprocessing(backbone).eval_transform()
    data = Repeats(tasks=10, looks=5, train_per_class=6, test_per_class=1).load(0)
    means = []
    for task in range(10):
        with torch.inference_mode():
            hidden = backbone.enter(
                torch.stack([transform(image) for image in of_task(data, task)]), backbone.depth - 1
            )
        means.append(hidden.mean(dim=(0, 1)))
    distance = torch.cdist(torch.stack(means[5:]), torch.stack(means[:5]))
    same = distance.diagonal()
    other = distance.masked_fill(torch.eye(5, dtype=torch.bool), torch.inf).min(dim=1).values
    assert (other > 2 * same).all(), (same, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"looks": 6}, "looks must be between 1 and 5, got 6"),
        ({"looks": 0}, "looks must be between"),
        ({"classes_per_task": 0}, "classes_per_task must be at least 1"),
        ({"test_per_class": 0}, "test_per_class must be at least 1"),
        ({"size": 8}, "size must be at least 16"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Repeats(**options)  # type: ignore[arg-type]


def test_too_many_tasks_and_negative_seeds() -> None:
    with pytest.raises(ConfigError, match="tasks must be between 1 and 154 with 4 new characters each, got 155"):
        Repeats(tasks=155).load(0)
    with pytest.raises(ConfigError, match="must not be negative"):
        SMALL.load(-1)
