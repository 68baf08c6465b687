"""From benchmark data to Avalanche: which items, which labels, which transform, and that a strategy runs on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cl_adapters.benchmarks.base import BenchmarkData, ImageSet, TextSet
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.datasets import ImageDataset, task_indices
from cl_adapters.errors import DataError

ORDER, SIZES = (3, 0, 6, 5, 1, 2, 4), (3, 1, 2, 1)


def image_set(per_class: int, offset: int, sides: tuple[int, ...] = (4,)) -> ImageSet:
    """Images whose first pixel is (label, position, offset); labels run 0, 1, ..., 6, 0, 1, ..."""
    labels = np.tile(np.arange(7), per_class)
    images = []
    for position, label in enumerate(labels):
        side = sides[position % len(sides)]
        images.append(np.full((side, side, 3), (label, position, offset), dtype=np.uint8))
    return ImageSet(images, labels)


@pytest.fixture
def data() -> BenchmarkData:
    return BenchmarkData(
        name="toy",
        classes=tuple("abcdefg"),
        class_order=ORDER,
        task_sizes=SIZES,
        licence="made up",
        train=image_set(3, offset=10),
        test=image_set(2, offset=20),
    )


def augmenting(image: Image.Image) -> torch.Tensor:
    return torch.cat([plain(image), torch.ones(1)])


def plain(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)


def test_image_dataset_takes_indices_in_order(data: BenchmarkData) -> None:
    dataset = ImageDataset(data.train, [5, 0, 9], plain)
    assert len(dataset) == 3
    assert dataset.targets == [5, 0, 2]
    items = [dataset[i] for i in range(3)]
    assert [(x.tolist(), y) for x, y in items] == [([5, 5, 10], 5), ([0, 0, 10], 0), ([2, 9, 10], 2)]
    assert all(type(y) is int for _, y in items)


def test_image_dataset_whole_and_without_transform(data: BenchmarkData) -> None:
    dataset = ImageDataset(data.test)
    image, label = dataset[13]
    assert len(dataset) == 14
    assert label == 6
    assert isinstance(image, Image.Image)
    assert image.size == (4, 4)
    assert image.getpixel((0, 0)) == (6, 13, 20)
    with pytest.raises(IndexError):
        dataset[14]


def test_image_dataset_loads_in_workers(data: BenchmarkData) -> None:
    loader = DataLoader(ImageDataset(data.train, transform=plain), batch_size=21, num_workers=1)
    x, y = next(iter(loader))
    assert x.shape == (21, 3)
    assert y.tolist() == data.train.labels.tolist()


def test_images_of_several_sizes() -> None:
    dataset = ImageDataset(image_set(2, 0, sides=(3, 8)))
    assert [dataset[i][0].size for i in range(4)] == [(3, 3), (8, 8), (3, 3), (8, 8)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0, 2.0], r"labels are whole numbers, int64 \[N\], got float64 \[3\]"),
        (["a", "b", "c"], r"labels are whole numbers, .*got <U1"),
        ([[0], [1], [2]], r"got int64 \[3, 1\]"),
        ([0, 1, -1], r"sample 2 \(c\.png\) has label -1; labels count from 0"),
    ],
)
def test_labels_that_are_no_places_of_classes(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(np.zeros((3, 4, 4, 3), np.uint8), np.array(labels), ["a.png", "b.png", "c.png"])
    with pytest.raises(DataError, match=message):
        TextSet(["a", "b", "c"], np.array(labels), ["a.png", "b.png", "c.png"])


def test_a_label_without_a_class(data: BenchmarkData) -> None:
    wrong = ImageSet(data.test.images, np.where(data.test.labels == 6, 2**40, data.test.labels))
    with pytest.raises(DataError, match=r"toy: a test image has label 1099511627776, .* only 7 classes"):
        dataclasses.replace(data, test=wrong)


def test_task_indices(data: BenchmarkData) -> None:
    assert task_indices(data.train, (5, 1)) == [1, 5, 8, 12, 15, 19]
    assert task_indices(data.train, ()) == []


def test_tasks_classes_and_timeline(data: BenchmarkData) -> None:
    benchmark = to_avalanche(data, augmenting, plain)
    for stream, per_class in ((benchmark.train_stream, 3), (benchmark.test_stream, 2)):
        assert len(stream) == 4
        seen: set[int] = set()
        for experience, task, number in zip(stream, data.tasks, range(4), strict=True):
            assert experience.current_experience == number
            assert set(experience.classes_in_this_experience) == set(task)
            assert experience.previous_classes == seen
            seen |= set(task)
            assert experience.classes_seen_so_far == seen
            assert sorted(experience.dataset.targets) == sorted(task * per_class)


def test_labels_are_not_renumbered_and_nothing_is_lost(data: BenchmarkData) -> None:
    """Seven classes do not divide by four: Avalanche's own generator would drop some."""
    benchmark = to_avalanche(data, augmenting, plain)
    for stream, part, offset in ((benchmark.train_stream, data.train, 10), (benchmark.test_stream, data.test, 20)):
        items = [item for experience in stream for item in experience.dataset]
        for x, y, t in items:
            assert x[0] == y
            assert x[2] == offset
            assert t == 0
        assert sorted(int(x[1]) for x, _, _ in items) == list(range(len(part)))


def test_transforms_switch_for_training_only(data: BenchmarkData) -> None:
    benchmark = to_avalanche(data, augmenting, plain)
    train, test = benchmark.train_stream[0].dataset, benchmark.test_stream[0].dataset
    assert [len(d[0][0]) for d in (train, train.train(), train.eval(), train.eval().train())] == [4, 4, 3, 4]
    assert [len(d[0][0]) for d in (test, test.train(), test.eval())] == [3, 3, 3]
    assert len(train[0][0]) == 4, "switching returns a view and leaves the data set as it was"


def test_transforms_run_per_item_when_asked_for(data: BenchmarkData) -> None:
    calls: list[Image.Image] = []

    def counting(image: Image.Image) -> torch.Tensor:
        calls.append(image)
        return plain(image)

    benchmark = to_avalanche(data, counting, plain)
    assert not calls
    dataset = benchmark.train_stream[0].dataset
    dataset[0], dataset[0]
    assert len(calls) == 2


def test_items_look_like_those_of_class_incremental_benchmark(data: BenchmarkData) -> None:
    from avalanche.benchmarks import class_incremental_benchmark

    theirs = class_incremental_benchmark(
        {"train": ImageDataset(data.train, transform=plain), "test": ImageDataset(data.test, transform=plain)},
        class_order=list(ORDER),
        num_classes_per_exp=list(SIZES),
    )
    ours = to_avalanche(data, plain, plain)
    for name in ("train_stream", "test_stream"):
        for mine, their in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert mine.classes_in_this_experience == their.classes_in_this_experience
            assert type(mine.dataset[0]) is type(their.dataset[0])
            assert [type(part) for part in mine.dataset[0]] == [type(part) for part in their.dataset[0]]
            as_rows = [{(*x.tolist(), y, t) for x, y, t in e.dataset} for e in (mine, their)]
            assert as_rows[0] == as_rows[1]


def test_an_avalanche_strategy_trains_and_evaluates(data: BenchmarkData) -> None:
    from avalanche.training.supervised import Naive

    benchmark = to_avalanche(data, plain, plain)
    model = torch.nn.Linear(3, 7)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-4), train_mb_size=4, evaluator=None
    )
    before = model.weight.detach().clone()
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    assert not torch.equal(before, model.weight)
