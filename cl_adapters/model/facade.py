"""AdapterModel: backbone + bank + heads + predictor. Usable alone: train with a strategy, then save, load, predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from cl_adapters.backbones.batches import Inputs, batch_size, take, to_device
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Routes
from cl_adapters.bank.site_adapters import Watch
from cl_adapters.errors import ClAdaptersError, DataError
from cl_adapters.features import FeatureMemory, LazyFeatures
from cl_adapters.model.heads import LinearHead, PrototypeHead
from cl_adapters.model.origins import Origin
from cl_adapters.model.predict import Answer, answer_files, answer_texts
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.base import Part
from cl_adapters.predictors.base import Prediction, Predictor
from cl_adapters.predictors.fixed import Fixed

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.pool import AdapterPool

__all__ = ["AdapterModel", "Answer"]

P = TypeVar("P", bound=Part)


class AdapterModel(nn.Module):
    """A continually trained classifier.

    Attributes:
        backbone: frozen encoder.
        bank: adapters; None for strategies that train none.
        head: linear head, one column per class.
        prototypes: prototype head, one column per class.
        statistics: class Gaussians in column order, or None.
        parts: whatever else the strategy keeps, by name; saved with the model.
        predictor: the inference rule.
        classes: class label of each column, in arrival order.
        class_names: label to name, where known.
        task_of_column: int64 [C], the task (0-based) in which each column arrived.
        task_of_slot: the task in which each adapter was made.
        origins: what each adapter was made of, by slot, where a strategy said so.
        record_of_slot: id of each adapter in the pool that the model was made from; else empty.
    """

    parts: nn.ModuleDict

    def __init__(self, backbone: FrozenBackbone, bank: AdapterBank | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.bank = bank
        self.head = LinearHead(backbone.num_features)
        self.prototypes = PrototypeHead(backbone.num_features)
        self.statistics: ClassStatistics | None = None
        self.parts = nn.ModuleDict()
        self.predictor: Predictor = Fixed(slot=-1, head="prototype")
        self.classes: list[int] = []
        self.class_names: dict[int, str] = {}
        self.task_of_column = torch.empty(0, dtype=torch.long)
        self.task_of_slot: list[int] = []
        self.origins: dict[int, Origin] = {}
        self.record_of_slot: tuple[str, ...] = ()
        self.to(backbone.device)

    @property
    def num_slots(self) -> int:
        """Adapters in the bank."""
        return 0 if self.bank is None else self.bank.num_slots

    @property
    def num_tasks(self) -> int:
        """Tasks so far."""
        return int(self.task_of_column[-1]) + 1 if len(self.task_of_column) else 0

    @property
    def slot_of_column(self) -> Tensor:
        """The adapter of each class, int64 [C]: the newest that was made up to its task; -1 where there was none."""
        made = [*self.task_of_slot, *range(len(self.task_of_slot), self.num_slots)]
        return torch.searchsorted(torch.tensor(made, dtype=torch.long), self.task_of_column, right=True) - 1

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self.backbone.device

    def add_task(self, labels: Sequence[int]) -> None:
        """Append one column per new label, as the next task.

        Raises:
            DataError: see :meth:`check_new`.
        """
        self.check_new(labels)
        task = self.num_tasks
        self.classes.extend(labels)
        self.task_of_column = torch.cat([self.task_of_column, torch.full((len(labels),), task)])

    def date_slots(self, task: int) -> None:
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

    def check_new(self, labels: Sequence[int]) -> None:
        """Check that these labels can be the next task.

        Raises:
            DataError: no label, or one that is already known.
        """
        if not labels:
            raise DataError("a task needs at least one class")
        known = sorted(set(labels) & set(self.classes))
        if known:
            raise DataError(
                f"classes {known} were learned in an earlier task; class-incremental learning takes each class in one "
                "task. Merge the tasks, or leave those images out"
            )

    def columns_of(self, labels_B: Tensor) -> Tensor:
        """Columns (int64 [B]) of class labels (int64 [B]); -1 where the class is not known."""
        table = {label: column for column, label in enumerate(self.classes)}
        return torch.tensor([table.get(label, -1) for label in labels_B.tolist()], dtype=torch.long)

    def name_of(self, label: int) -> str:
        """Class name of a label, or its number as text."""
        return self.class_names.get(label, str(label))

    def features(
        self,
        x: Inputs,
        routes: Routes | None,
        noise: torch.Generator | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Features [B, D] with the given adapters (None: the bare backbone).

        Args:
            x: B inputs, or with ``start`` the inputs of that block.
            routes: who uses which adapter.
            noise: generator of dropout masks (training).
            start: go on from the input of this block; None: from the beginning.
            stop: end at the input of this block (``backbone.depth``, None: the features) and return that.
            watch: is told the input of every site that has a route.

        Raises:
            ClAdaptersError: routes without a bank.
        """
        if self.bank is None:
            if routes is not None:
                raise ClAdaptersError("this model has no adapters to route to")
            return self._run(x, start, stop)
        with self.bank.route(routes, noise, watch):
            return self._run(x, start, stop)

    def _run(self, x: Inputs, start: int | None, stop: int | None) -> Tensor:
        if start is not None:
            assert isinstance(x, Tensor)
            return self.backbone.resume(x, start, stop)
        return self.backbone.features(x) if stop is None else self.backbone.enter(x, stop)

    def answer(
        self,
        x: Inputs,
        memory: FeatureMemory | None = None,
        samples: Sequence[int] | None = None,
        *,
        predictor: Predictor | None = None,
    ) -> Prediction:
        """Predict one batch and say how; changes no state.

        Args:
            x: B inputs.
            memory: features known from earlier evaluations, and
            samples: the B numbers under which it knows them.
            predictor: another inference rule than the model's own.

        Raises:
            ClAdaptersError: no task was learned yet, or the memory is of another model or another batch.
        """
        if not self.classes:
            raise ClAdaptersError("this model knows no class yet: train it on a task first")
        if memory is not None:
            memory.check(self, batch_size(x), samples)
        with torch.inference_mode():
            lazy = LazyFeatures(self, to_device(x, self.device), memory, samples)
            prediction = (predictor or self.predictor).predict(self, lazy)
            if "abstention" not in self.parts:
                return prediction
            return self.part("abstention", Abstention).applied(self, lazy, prediction)

    def forward(self, x: Inputs) -> Tensor:
        """Logits float32 [B, C]; columns are ``classes``."""
        return self.answer(x).logits.float()

    def predict(self, x: Inputs, batch: int = 64, *, predictor: Predictor | None = None) -> Tensor:
        """Logits float32 [B, C] on the CPU, in batches of ``batch``; columns are ``classes``."""
        rows = torch.arange(batch_size(x)).split(batch)
        return torch.cat([self.answer(take(x, part), predictor=predictor).logits.float().cpu() for part in rows])

    def predict_files(
        self, files: Sequence[str | Path], batch: int = 64, *, predictor: Predictor | None = None
    ) -> list[Answer]:
        """Classify image files, ``batch`` at a time, by the model's inference rule or another ``predictor``.

        Raises:
            DataError: a file that is no readable image, by name.
            ClAdaptersError: the backbone takes no images.
        """
        return answer_files(self, files, batch, predictor)

    def predict_texts(
        self, texts: Sequence[str], batch: int = 64, *, predictor: Predictor | None = None
    ) -> list[Answer]:
        """Classify texts, ``batch`` of similar length at a time; the answers are in the order of the texts.

        Raises:
            ClAdaptersError: the backbone takes no texts.
        """
        return answer_texts(self, texts, batch, predictor)

    def save(self, path: str | Path, *, overwrite: bool = False, link_from: str | Path | None = None) -> Path:
        """Write the model (without the backbone's weights) as a folder, atomically; see ``model_files``.

        Args:
            path: folder to make.
            overwrite: replace an existing one.
            link_from: an earlier save of the same model; unchanged files are hard-linked.

        Raises:
            StorageError: the place exists or cannot be written.
        """
        from cl_adapters.model.files import save_model

        link = None if link_from is None else Path(link_from)
        return save_model(self, Path(path), overwrite=overwrite, link_from=link)

    @classmethod
    def load(cls, path: str | Path, backbone: FrozenBackbone | None = None, device: str = "cpu") -> AdapterModel:
        """Read a folder of :meth:`save`; without a ``backbone`` the recorded one is loaded again by name.

        Raises:
            StorageError: missing, altered or newer files.
            IncompatibleBackbone: not the backbone that the adapters were trained on.
        """
        from cl_adapters.model.files import load_model

        return load_model(Path(path), backbone).to(device)

    def save_pool(
        self,
        path: str | Path,
        *,
        tags: Sequence[str] = (),
        benchmark: str | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
        compression: str | None = None,
    ) -> AdapterPool:
        """Write the model as a pool with one record per adapter; see :func:`cl_adapters.pool.models.save_pool`."""
        from cl_adapters.pool.models import save_pool

        return save_pool(self, Path(path), tags=tags, benchmark=benchmark, metrics=metrics, compression=compression)

    @classmethod
    def from_pool(
        cls,
        pool: AdapterPool | str | Path,
        ids: Sequence[str] | None = None,
        *,
        backbone: FrozenBackbone | None = None,
        predictor: Predictor | None = None,
        index: AdapterIndex | str | Path | None = None,
        limit: int = 64,
        device: str = "cpu",
    ) -> AdapterModel:
        """A model of a pool's adapters, which are loaded when used; see :func:`cl_adapters.pool.models.from_pool`."""
        from cl_adapters.pool.models import from_pool

        return from_pool(pool, ids, backbone=backbone, predictor=predictor, index=index, limit=limit).to(device)
