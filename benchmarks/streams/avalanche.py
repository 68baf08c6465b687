"""From benchmark data to Avalanche's streams (imports Avalanche: seconds and a gigabyte)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.benchmarks.utils.transform_groups import TransformGroups

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.base import BenchmarkData, SampleSet
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.datasets import TextDataset, Transform, as_dataset, task_indices
from cl_adapters.benchmarks.streams.prepared import prepare


def load_benchmark(
    name: str, backbone: FrozenBackbone, *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> CLScenario:
    """Load a benchmark of this package as an Avalanche benchmark, with the preprocessing of a backbone.

    Args:
        name: "digits", "glyphs", "folder:PATH", "text:FILE", ...
        backbone: whose preprocessing is used.
        seed: of the class order and of made-up images.
        options: parameters of the benchmark, such as ``{"tasks": 10}``.

    Raises:
        UnknownName: no such benchmark.
        ConfigError: a wrong option, or a backbone that takes no such samples.
        DataError: data that cannot be used.
    """
    return to_avalanche(*prepare(parse_benchmark(name, options or {})[1].load(seed), backbone))


def to_avalanche(
    data: BenchmarkData, train_transform: Transform | None = None, eval_transform: Transform | None = None
) -> CLScenario:
    """Return an Avalanche benchmark with one experience per task in ``train_stream`` and ``test_stream``.

    Items are (x, y, t) with t = 0, as ``class_incremental_benchmark`` gives them, and labels are those of
    ``data.classes``, never renumbered. ``exp.dataset.train()`` and ``.eval()`` switch the transform of a
    training experience; a test experience always uses ``eval_transform``. Avalanche's own
    ``class_incremental_benchmark`` is not used because it drops classes that do not divide evenly.

    Texts are token ids, int64 [N] with one N for the whole split, so that every collate function can stack them, and
    their data sets have ``lengths``, by which the strategies of this package make their batches.

    Args:
        data: the loaded benchmark; of texts what :func:`cl_adapters.benchmarks.streams.prepared.prepare` gives.
        train_transform: of images: from an RGB Pillow image to a tensor, with augmentation.
        eval_transform: the same without augmentation.

    Raises:
        DataError: texts without tokens.
    """
    train = [_experience(data.train, labels, train_transform, eval_transform) for labels in data.tasks]
    test = [_experience(data.test, labels, eval_transform, eval_transform).eval() for labels in data.tasks]
    return with_classes_timeline(benchmark_from_datasets(train=train, test=test))


def _experience(
    samples: SampleSet,
    labels: Sequence[int],
    train_transform: Transform | None,
    eval_transform: Transform | None,
) -> AvalancheDataset:
    dataset = as_dataset(samples, task_indices(samples, labels))
    attributes = [DataAttribute(dataset.targets, "targets"), TaskLabels(ConstantSequence(0, len(dataset)))]
    if isinstance(dataset, TextDataset):
        attributes.append(DataAttribute(dataset.lengths, "lengths"))
    return TaskAwareSupervisedClassificationDataset(  # with ``task_set``, as those of Avalanche have
        [dataset],
        data_attributes=attributes,
        # One object per data set: Avalanche keeps the current group inside it.
        transform_groups=TransformGroups({"train": train_transform, "eval": eval_transform}),
    )
