"""Task labels of Avalanche: which classes belong to a task, where answers are restricted to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.model.state import ModelState
from cl_adapters.strategies._loop.experiences import experience_classes


class TaskClasses:
    """The class labels that came in training under each task label."""

    def __init__(self) -> None:
        self._classes: dict[int, set[int]] = {}
        self._warned = False

    def check(self, experience: Any, wanted: bool) -> None:
        """Look at an experience before it is trained.

        Raises:
            ConfigError: task labels are wanted, and it has none.
        """
        labels = _task_labels(experience)
        if wanted and len(labels) != 1:
            raise ConfigError(
                f"task_incremental=True needs one task label for each experience, and this one has {labels or 'none'}: "
                "make the benchmark with task labels (nc_benchmark(..., task_labels=True), with_task_labels), or leave "
                "task_incremental out"
            )
        if not wanted and any(labels) and not self._warned:
            self._warned = True
            warnings.warn(
                f"task label {labels[0]} is ignored: an answer may be any class so far; pass task_incremental=True to "
                "restrict it to the classes of its task",
                stacklevel=3,
            )

    def note(self, experience: Any) -> None:
        """Remember the classes of an experience that is trained."""
        for label in _task_labels(experience):
            self._classes.setdefault(label, set()).update(experience_classes(experience))

    def to_plain(self) -> list[tuple[int, list[int]]]:
        """Task labels and their classes, ready for JSON."""
        return [(label, sorted(classes)) for label, classes in self._classes.items()]

    def load(self, plain: Iterable[tuple[int, Iterable[int]]]) -> None:
        """Take back what :meth:`to_plain` gave."""
        self._classes = {label: set(classes) for label, classes in plain}

    def restricted(self, logits_BC: Tensor, mbatch: Sequence[Any], model: ModelState) -> Tensor:
        """Logits with minus infinity at classes of other tasks; as they are for tasks that were not trained yet.

        Args:
            logits_BC: by column.
            mbatch: of Avalanche; its last entry are the task labels, int64 [B].
            model: whose classes have to be known here.

        Raises:
            ClAdaptersError: the batch has no task labels, or the model learned tasks before that are not known here.
        """
        if len(mbatch) < 3:
            raise ClAdaptersError("task_incremental=True needs task labels, and the samples of this stream have none")
        unknown = sorted(set(model.classes) - set().union(*self._classes.values()))
        if unknown:
            raise ClAdaptersError(
                f"the task label of class {unknown[0]} is not known, because the model learned it before: give the "
                "experiences of then with strategy.recall(benchmark.train_stream[:N])"
            )
        allowed_BC = torch.ones_like(logits_BC, dtype=torch.bool)
        task_B = torch.as_tensor(mbatch[-1]).to(logits_BC.device)
        for label, classes in self._classes.items():
            allowed_C = torch.tensor([c in classes for c in model.classes], device=logits_BC.device)
            allowed_BC[task_B == label] = allowed_C
        return logits_BC.masked_fill(~allowed_BC, -torch.inf)


def _task_labels(experience: Any) -> list[int]:
    return sorted({int(label) for label in getattr(experience, "task_labels", None) or ()})
