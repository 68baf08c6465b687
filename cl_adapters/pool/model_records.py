"""A model as a pool, one record per adapter.

A class belongs to the newest adapter that was made up to its task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from cl_adapters._io import new_folder, write_json
from cl_adapters.bank.bank import BARE
from cl_adapters.errors import PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.origins import Origin
from cl_adapters.parts.keys import Keys
from cl_adapters.parts.retrieval import keys_of
from cl_adapters.pool.edit import NewAdapter
from cl_adapters.pool.model_card import CARD, card_of
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import PoolClass
from cl_adapters.predictors.base import predictors


def save_pool(
    model: AdapterModel,
    path: Path,
    *,
    tags: Sequence[str] = (),
    benchmark: str | None = None,
    metrics: Mapping[int, Mapping[str, float]] | None = None,
    compression: str | None = None,
) -> AdapterPool:
    """Write a model as a new pool with one record per adapter, or none of it.

    Each record has the classes of its adapter with their keys, rows of both heads and held-back features. To add them
    to another pool: ``AdapterPool.copy_to``.

    Args:
        model: whose predictor answers a class by the adapter of its task.
        path: a folder that does not exist.
        tags: of every record.
        benchmark: where the data came from.
        metrics: of the record of a task, by the task's number.
        compression: codec of the stored adapters; see :class:`AdapterPool`.

    Raises:
        PoolError: a model that is more than its adapters: its answers need all of them together.
        StorageError: the place exists or cannot be written.
    """
    _check_by_class(model)
    with new_folder(path) as scratch:
        pool = AdapterPool.create(scratch, model.backbone)
        groups = list(_groups(model))
        ids = _ids(model, [slot for slot, _ in groups])
        names = {slot: id for (slot, _), id in zip(groups, ids, strict=True) if slot != BARE}
        pool.add_all(
            _new(
                model,
                slot,
                columns,
                id,
                names,
                tags=tuple(tags),
                benchmark=benchmark,
                metrics=metrics or {},
                compression=compression,
            )
            for (slot, columns), id in zip(groups, ids, strict=True)
        )
        write_json(scratch / CARD, card_of(model, pool, names))
    return AdapterPool.open(path, backbone=model.backbone)


def _new(
    model: AdapterModel,
    slot: int,
    columns: list[int],
    id: str,
    names: Mapping[int, str],
    *,
    tags: tuple[str, ...],
    benchmark: str | None,
    metrics: Mapping[int, Mapping[str, float]],
    compression: str | None,
) -> NewAdapter:
    """One adapter of a model, or the bare backbone, with its classes."""
    task, origin = _task_of(model, slot, columns), model.origins.get(slot, Origin())
    bank = None if slot == BARE else model.bank
    return NewAdapter(
        tensors={} if bank is None else bank.export(slot),
        adapter=None if bank is None else bank.adapter,
        classes=[PoolClass(label=model.classes[c], name=model.class_names.get(model.classes[c])) for c in columns],
        id=id,
        knowledge=_knowledge(model, columns),
        tags=tags,
        parents=[names[parent] for parent in origin.parents if parent in names],
        merge=origin.merge,
        compression=None if slot == BARE else compression,
        benchmark=benchmark,
        metrics=None if task is None else metrics.get(task),
        task=task,
    )


def _check_by_class(model: AdapterModel) -> None:
    if not model.predictor.by_class:
        raise PoolError(
            f"a model that predicts by {predictors.name_of(model.predictor)!r} is no set of adapters with classes of "
            "their own, so it cannot be a pool: its answers need all its parts. Keep it with model.save(folder)"
        )
    if "class_keys" in model.parts and not isinstance(model.parts["class_keys"], Keys):
        keys_of(model).description()  # an index in the place of keys: says why it cannot be saved
    if not model.classes:
        raise PoolError("this model knows no class yet: train it on a task first")


def _groups(model: AdapterModel) -> Iterator[tuple[int, list[int]]]:
    """Each adapter with its columns; before them the tasks that the bare backbone answers for, one by one."""
    slots, tasks = model.slot_of_column.tolist(), model.task_of_column.tolist()
    bare = {task: [c for c, slot in enumerate(slots) if slot == BARE and tasks[c] == task] for task in sorted({*tasks})}
    yield from ((BARE, columns) for columns in bare.values() if columns)
    for slot in range(model.num_slots):
        yield slot, [column for column, own in enumerate(slots) if own == slot]


def _task_of(model: AdapterModel, slot: int, columns: list[int]) -> int | None:
    if columns:
        return int(model.task_of_column[columns[0]])
    return model.task_of_slot[slot] if slot < len(model.task_of_slot) else None


def _ids(model: AdapterModel, slots: list[int]) -> list[str]:
    """Ids of the records: those that the adapters had in the pool that they came from; else the next free ones."""
    known = model.record_of_slot
    free = (id for id in (f"task-{number:03d}" for number in count()) if id not in known)
    return [known[slot] if 0 <= slot < len(known) else next(free) for slot in slots]


def _knowledge(model: AdapterModel, columns: list[int]) -> dict[str, Tensor]:
    """The rows of these classes."""
    found: dict[str, Tensor] = {}
    if not columns:
        return found
    if model.head.num_classes == len(model.classes):
        found |= {"head.weight": model.head.weight[columns], "head.bias": model.head.bias[columns]}
    if model.prototypes.num_classes == len(model.classes):
        found["prototypes"] = model.prototypes.prototypes[columns]
    if "class_keys" in model.parts:
        keys = model.part("class_keys", Keys)
        found["keys"], found["key_class"] = _rows(keys.keys_MD, keys.column_M, columns)
        found["held_out"], found["held_out_class"] = _rows(keys.held_out_HD, keys.held_out_column_H, columns)
    elif "prototypes" in found and getattr(model.predictor, "slot", None) == BARE:
        found |= {"keys": found["prototypes"], "key_class": torch.arange(len(columns))}  # taken under the bare backbone
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def _rows(rows_MD: Tensor, column_M: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of these columns, and the position of each one's column among them."""
    position = torch.full((max([*columns, *column_M.tolist()]) + 1,), -1)
    position[columns] = torch.arange(len(columns))
    place_M = position[column_M.cpu()]
    return rows_MD.cpu()[place_M >= 0], place_M[place_M >= 0]
