"""ModelState: all that was learned, class by class and adapter by adapter. Predictors and parts read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cl_adapters._forms import Count
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import ClAdaptersError, DataError
from cl_adapters.model.encoder import AdaptedEncoder
from cl_adapters.model.heads import LinearHead, PrototypeHead
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts.base import Part

P = TypeVar("P", bound=Part)

LABELS = "labels are whole numbers from 0 to 2**63 - 1: number the classes, and leave out samples without one"


def class_label(value: Any, owner: str) -> int:
    """A class label as a Python int: of an int, bool, whole float, or a tensor or array of one such number.

    Args:
        value: the label.
        owner: whose it is, for the message.

    Raises:
        DataError: it is something else, negative, or does not fit int64.
    """
    try:
        label = -1 if isinstance(value, str | bytes) else int(value)
        fits = 0 <= label < 2**63 and bool(label == value)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # NaN, None, tensors of several numbers
        fits = False
    if not fits:
        raise DataError(f"{owner} has label {value!r}; {LABELS}")
    return label


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What one adapter was made of, besides its own images.

    Attributes:
        parents: slots of the adapters that it started from or was merged with.
        merge: how, as plain JSON, such as {"method": "ema", "momentum": 0.1}; None where nothing was merged. With
            "head": "aligned" the linear head's rows of all classes were trained on samples of all classes up to then.
    """

    parents: tuple[Count, ...] = ()
    merge: Mapping[str, Any] | None = None


class ModelState(AdaptedEncoder):
    """An encoder with heads, classes, statistics and parts.

    Attributes:
        head: linear head, one column per class.
        prototypes: prototype head, one column per class.
        statistics: class Gaussians in column order, or None.
        parts: whatever else the strategy keeps, by name; saved with the model.
        classes: class label of each column, in arrival order.
        class_names: label to name, where known.
        task_of_column: int64 [C], the task (0-based) in which each column arrived.
        returned: column to the newest task in which its class was trained, where that is a later one.
        samples: column to the training images behind its means and statistics, where a strategy merges any.
        task_of_slot: the task in which each adapter was made.
        origins: what each adapter was made of, by slot, where a strategy said so.
        record_of_slot: id of each adapter in the pool that the model was made from; else empty.
    """

    parts: nn.ModuleDict

    def __init__(self, backbone: FrozenBackbone, bank: AdapterBank | None = None) -> None:
        super().__init__(backbone, bank)
        self.head = LinearHead(backbone.num_features)
        self.prototypes = PrototypeHead(backbone.num_features)
        self.statistics: ClassStatistics | None = None
        self.parts = nn.ModuleDict()
        self.classes: list[int] = []
        self.class_names: dict[int, str] = {}
        self.task_of_column = torch.empty(0, dtype=torch.long)
        self.returned: dict[int, int] = {}
        self.samples: dict[int, int] = {}
        self.task_of_slot: list[int] = []
        self.origins: dict[int, Origin] = {}
        self.record_of_slot: tuple[str, ...] = ()
        self.to(backbone.device)

    @property
    def num_tasks(self) -> int:
        """Tasks so far; each brought a class, or trained one again."""
        return max([*self.task_of_column[-1:].tolist(), *self.returned.values()], default=-1) + 1

    @property
    def newest_task_of_column(self) -> Tensor:
        """The newest task in which each class was trained, int64 [C]."""
        if not self.returned:
            return self.task_of_column
        tasks = enumerate(self.task_of_column.tolist())
        return torch.tensor([self.returned.get(column, task) for column, task in tasks], dtype=torch.long)

    @property
    def slot_of_column(self) -> Tensor:
        """The adapter of each class, int64 [C]: the newest up to the newest task that trained it; -1 without one."""
        made = [*self.task_of_slot, *range(len(self.task_of_slot), self.num_slots)]
        return torch.searchsorted(torch.tensor(made, dtype=torch.long), self.newest_task_of_column, right=True) - 1

    def add_task(self, labels: Sequence[int]) -> None:
        """The next task: one more column per new label; classes that were learned before keep theirs.

        Raises:
            DataError: see :meth:`check_task`.
        """
        self.check_task(labels)
        task = self.num_tasks
        new = [label for label in labels if label not in self.classes]
        again = {column: task for column, label in enumerate(self.classes) if label in labels}
        self.returned = self.returned | again
        self.classes.extend(new)
        self.task_of_column = torch.cat([self.task_of_column, torch.full((len(new),), task)])

    def assign_new_slots(self, task: int) -> None:
        """Note that the adapters added since the last call belong to ``task``."""
        self.task_of_slot += [task] * (self.num_slots - len(self.task_of_slot))

    def part(self, name: str, kind: type[P]) -> P:
        """A part by name.

        Raises:
            ClAdaptersError: the model has none of that name and kind.
        """
        found = dict(self.parts.items()).get(name)
        if not isinstance(found, kind):
            raise ClAdaptersError(f"this model has no part {name!r} of type {kind.__name__}; it has {list(self.parts)}")
        return found

    def check_task(self, labels: Sequence[int]) -> None:
        """Check that these labels can be the next task.

        Raises:
            DataError: no label, or one that cannot be a label.
        """
        if not labels:
            raise DataError("a task needs at least one class")
        for place, label in enumerate(labels):
            class_label(label, f"class {place} of the task")

    def columns_of(self, labels_B: Tensor) -> Tensor:
        """Columns (int64 [B]) of class labels (int64 [B]); -1 where the class is not known.

        Raises:
            DataError: a label that is no whole number.
        """
        table = {label: column for column, label in enumerate(self.classes)}
        labels = labels_B.tolist()
        for place, label in enumerate(labels):
            if isinstance(label, float) and not label.is_integer():
                raise DataError(f"sample {place} of the batch has label {label!r}; {LABELS}")
        return torch.tensor([table.get(label, -1) for label in labels], dtype=torch.long)

    def name_of(self, label: int) -> str:
        """Class name of a label, or its number as text."""
        return self.class_names.get(label, str(label))
