"""Evaluating a model on the tasks seen so far, without Avalanche and without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from cl_adapters.benchmarks.base import BenchmarkData
from cl_adapters.benchmarks.streams.datasets import TextDataset, Transform, as_dataset, task_indices
from cl_adapters.config import counted
from cl_adapters.features import FeatureMemory
from cl_adapters.model.facade import AdapterModel


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation over the tasks 0..t found.

    Attributes:
        accuracy: percent right per task, t + 1 numbers.
        routing: [t + 1][slots + 1] samples per right task and adapter that answered; column 0 is the bare backbone.
        passes: mean backbone passes per sample that a single prediction costs.
        computed: mean passes per sample that were really run; fewer where features were remembered.
    """

    accuracy: tuple[float, ...]
    routing: tuple[tuple[int, ...], ...]
    passes: float
    computed: float


def evaluate(
    model: AdapterModel,
    data: BenchmarkData,
    tasks: Sequence[int],
    transform: Transform | None = None,
    *,
    batch_size: int = 128,
    memory: FeatureMemory | None = None,
) -> Evaluation:
    """Accuracy of ``model`` on the test samples of the given tasks.

    Args:
        model: trained on these tasks.
        data: the benchmark; of texts what :func:`cl_adapters.benchmarks.streams.prepared.prepare` gives.
        tasks: from 0.
        transform: the backbone's evaluation transform of images.
        batch_size: of samples.
        memory: features of these test samples under adapters that have not changed since.

    Raises:
        ConfigError: ``batch_size`` is less than 1.
        DataError: texts without tokens.
    """
    batch_size = counted(batch_size, "batch_size")
    task_of_label = {label: task for task in tasks for label in data.tasks[task]}
    indices = [index for task in tasks for index in task_indices(data.test, data.tasks[task])]
    dataset = as_dataset(data.test, indices, transform)
    if isinstance(dataset, TextDataset):  # the longest first: little padding, and what does not fit fails at once
        indices = [indices[place] for place in np.argsort(dataset.lengths, kind="stable")[::-1]]
        dataset = as_dataset(data.test, indices)
    labels = torch.tensor(model.classes)
    right = np.zeros(len(tasks), dtype=np.int64)
    total = np.zeros(len(tasks), dtype=np.int64)
    routing = np.zeros((len(tasks), model.num_slots + 1), dtype=np.int64)
    position = {task: place for place, task in enumerate(tasks)}
    passes = computed = 0.0
    start = 0
    for x, y in DataLoader(dataset, batch_size=batch_size):
        known_before = 0 if memory is None else len(memory)
        answer = model.answer(x, memory, indices[start : start + len(y)])
        start += len(y)
        places = np.array([position[task_of_label[label]] for label in y.tolist()])
        np.add.at(right, places, (labels[answer.logits.argmax(1).cpu()] == y).numpy())
        np.add.at(total, places, 1)
        np.add.at(routing, (places, (answer.adapter + 1).numpy()), 1)
        cost = float(answer.passes.sum())
        passes += cost
        # where late blocks share the pass before them, features cost less than one pass each
        computed += cost if memory is None else min(cost, len(memory) - known_before)
    return Evaluation(
        accuracy=tuple((100.0 * right / total).tolist()),
        routing=tuple(map(tuple, routing.tolist())),
        passes=passes / len(indices),
        computed=computed / len(indices),
    )
