"""A model as a pool, one record per adapter, and a model of a pool's records.

A class belongs to the newest adapter that was made up to the newest task that trained it. The other way round, record i
is slot i and task i of the model; one that the bare backbone answers for is a slot that adds nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from cl_adapters._io import new_folder, write_json
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import BARE, AdapterBank, Loader
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.model.classifier import Classifier
from cl_adapters.model.state import Origin
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, check_own_keys, class_means
from cl_adapters.pool.checks import adapter_of
from cl_adapters.pool.edit import NewAdapter
from cl_adapters.pool.model_card import CARD, SCHEMA, anchor_of, read_card
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import PoolClass, Record
from cl_adapters.predictors.base import Predictor, predictors
from cl_adapters.predictors.nearest_key import NearestKey

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex

M = TypeVar("M", bound=Classifier)


def from_pool(
    cls: type[M],
    pool: AdapterPool | str | Path,
    ids: Sequence[str] | None = None,
    *,
    backbone: FrozenBackbone | None = None,
    predictor: Predictor | None = None,
    index: AdapterIndex | str | Path | None = None,
    limit: int = 64,
) -> M:
    """A model of a pool's records, in the order of the pool; adapters are loaded when they are used.

    Without a record its classes are gone, and every other number that the model reads is the same. Whether answers are
    the same too is up to the predictor. One that looks classes up by keys, or stays with one adapter, answers to the
    last bit as before wherever it chose another record (image by image; in a batch the last bits depend on how the
    images share adapters). Others depend on all classes: a vote and a mixture where the record took part in them;
    self-refined retrieval always, since it adds probabilities over all classes and can visit fewer adapters.

    With an ``index``, predictors that look inputs up by keys ask that, and the model holds no key itself (only the mean
    of each class). Its threshold is then the one that counts, not the pool's saved one: where it has none, nothing is
    refused. What counts is the threshold at this moment. Such a model is kept as pool and index: it cannot be saved.

    Like every model of adapters in a pool it cannot be trained further, since statistics of the classes are not there.

    Args:
        cls: what to make, :class:`AdapterModel` or a class derived from it.
        pool: a pool, or its folder.
        ids: the records; default all.
        backbone: where it is at hand; default the pool's.
        predictor: another predictor than the one that was saved. A pool without a saved one gets
            :class:`NearestKey`.
        index: of this pool, with all of these records; or the folder of a saved one; or, as text without a slash, its
            name in the pool's folder ("default").
        limit: adapters in memory at a time; see :meth:`AdapterBank.load_on_use`.

    Raises:
        UnknownName: an id that the pool does not have.
        PoolError: records that make no model: of several adapter types, with a class twice, with and without rows of
            a head; or the predictor needs a record that is not among them; or the index does not fit.
        StorageError: no index there, or a damaged one.
        IncompatibleBackbone: another backbone.
    """
    if not isinstance(pool, AdapterPool):
        pool = AdapterPool.open(pool, backbone=backbone, limit=0)  # the bank keeps what is loaded
    elif backbone is not None:
        pool.backbone_card.check(backbone)
    records = _chosen(pool, ids)
    model = cls(backbone or pool.backbone, _bank(pool, records, backbone or pool.backbone, limit))
    for task, record in enumerate(records):
        if record.classes:
            model.classes += record.labels
            rows = torch.full((len(record.classes),), task)
            model.task_of_column = torch.cat([model.task_of_column, rows])
        model.class_names |= {known.label: known.name for known in record.classes if known.name is not None}
    places = {record.id: slot for slot, record in enumerate(records)}
    if model.bank is not None:
        model.task_of_slot = list(range(len(records)))
        model.record_of_slot = tuple(record.id for record in records)
        for slot, record in enumerate(records):
            parents = tuple(places[parent] for parent in record.parents if parent in places)
            model.origins[slot] = Origin(parents=parents, merge=record.merge)
    card = read_card(pool.path)
    known = [(record, _rows(pool, record, index is not None)) for record in records if record.classes]
    _fill_heads(model, known)
    if index is None:
        _fill_keys(model, known, card)
    else:
        _look_up(model, pool, index, known)
    model.predictor = predictor or _predictor(model, records, card)
    return model.to(model.device)


def _chosen(pool: AdapterPool, ids: Sequence[str] | None) -> list[Record]:
    if ids is None and pool.broken:
        broken = pool.broken[0]
        raise PoolError(f"adapter {broken.id!r} cannot be used: {broken.reason}; remove it, or choose others by ids=")
    wanted = set(pool.ids if ids is None else [pool.get(id).id for id in ids])
    records = [record for record in pool.records if record.id in wanted]
    if not any(record.classes for record in records):
        raise PoolError(f"{pool.path} has no adapter with classes: nothing could be predicted")
    owner: dict[int, str] = {}
    for record in records:
        for label in record.labels:
            if label in owner:
                raise PoolError(
                    f"class {label} belongs to {owner[label]!r} and to {record.id!r}: choose one of them by ids="
                )
            owner[label] = record.id
    return records


def _bank(pool: AdapterPool, records: list[Record], backbone: FrozenBackbone, limit: int) -> AdapterBank | None:
    adapted = [record for record in records if record.adapter is not None]
    if not adapted:
        return None
    for record in adapted:
        if record.adapter != adapted[0].adapter:
            raise PoolError(
                f"{adapted[0].id!r} is {adapted[0].adapter}, but {record.id!r} is {record.adapter}: one model has "
                "adapters of one type with the same options; choose by ids="
            )
    adapter = adapter_of(adapted[0])
    assert adapter is not None
    bank = AdapterBank(backbone, adapter, blocks=sorted({block for record in adapted for block in record.blocks}))
    bank.load_on_use(len(records), _loader(pool, records), limit)
    return bank


def _loader(pool: AdapterPool, records: list[Record]) -> Loader:
    """Loads a record's adapter, as long as it is the one that the rest of the model was read with."""

    def load(slot: int) -> dict[str, Tensor]:
        then = records[slot]
        if then.id not in pool or pool.get(then.id).adapter_sha != then.adapter_sha:
            raise PoolError(f"adapter {then.id!r} was changed in the pool meanwhile: make the model again")
        return pool.tensors(then.id)

    return load


def _rows(pool: AdapterPool, record: Record, indexed: bool) -> dict[str, Tensor]:
    """Knowledge of a record; where an index has its keys, only the mean of each class's keys in their place."""
    found = pool.knowledge(record.id)
    if indexed and "keys" in found:
        rows, of, sizes = found["keys"].float(), found["key_class"], found.get("key_size")
        means_CD = class_means(rows, of, len(record.classes), sizes)
        found = {key: value for key, value in found.items() if not key.startswith(("key", "held_out"))}
        found["keys"] = means_CD
    return found


def _fill_heads(model: Classifier, known: list[tuple[Record, dict[str, Tensor]]]) -> None:
    weight, bias, prototypes = (_column(known, key) for key in ("head.weight", "head.bias", "prototypes"))
    groups = tuple(len(record.classes) for record, _ in known)
    model.head.groups = model.prototypes.groups = groups  # no record's logits depend on which others there are
    if weight is not None and bias is not None:
        model.head.weight, model.head.bias = nn.Parameter(weight), nn.Parameter(bias)
    if prototypes is not None:
        model.prototypes.prototypes = prototypes


def _fill_keys(model: Classifier, known: list[tuple[Record, dict[str, Tensor]]], card: Mapping[str, Any]) -> None:
    """Keys, and the saved thresholds."""
    rows = _column(known, "keys")
    if rows is None:
        return
    alone = {"kind": "prototypes", "held_out": 0.0} if len(rows) == len(model.classes) else {"kind": "features"}
    model.parts[CLASS_KEYS] = keys = Keys(build(KeysConfig, card.get("keys") or alone, "keys"), rows.shape[1])
    keys.keys_MD, keys.column_M, keys.size_M = rows, _columns(known, "key_class"), None
    if any("key_size" in knowledge for _, knowledge in known):  # other keys count as one feature each
        sizes = [knowledge.get("key_size", torch.ones_like(knowledge["key_class"])) for _, knowledge in known]
        keys.size_M = torch.cat(sizes)
    if any("held_out" in knowledge for _, knowledge in known):
        keys.held_out_HD = torch.cat([knowledge["held_out"] for _, knowledge in known if "held_out" in knowledge])
        keys.held_out_column_H = _columns(known, "held_out_class")
    if card.get("abstention"):
        model.parts["abstention"] = Abstention.restore(card["abstention"], {})


def _look_up(
    model: Classifier,
    pool: AdapterPool,
    index: AdapterIndex | str | Path,
    known: list[tuple[Record, dict[str, Tensor]]],
) -> None:
    """An index in the place of keys, and its threshold."""
    from cl_adapters.pool.indexed_keys import IndexedKeys, index_for

    records = [record for record, _ in known]
    opened, means_CD = index_for(pool, index, records), _column(known, "keys")
    if means_CD is None:
        raise PoolError(f"no adapter of {pool.path} has keys: there is nothing to look up; leave index= out")
    model.parts[CLASS_KEYS] = IndexedKeys(opened, records, means_CD)
    if opened.threshold is not None:
        model.parts["abstention"] = Abstention(opened.threshold, calibration={"index": opened.config.metric})


def _column(known: list[tuple[Record, dict[str, Tensor]]], key: str) -> Tensor | None:
    """These rows of all classes; None where no record has them."""
    without = [record.id for record, knowledge in known if key not in knowledge]
    if len(without) == len(known):
        return None
    if without:
        raise PoolError(
            f"adapter {without[0]!r} has no {key!r}, others have: one model cannot be made of them; choose by ids="
        )
    return torch.cat([knowledge[key] for _, knowledge in known])


def _columns(known: list[tuple[Record, dict[str, Tensor]]], key: str) -> Tensor:
    """Positions in the records' classes as columns of the model."""
    found, first = [torch.empty(0, dtype=torch.long)], 0
    for record, knowledge in known:
        if key in knowledge:
            found.append(knowledge[key] + first)
        first += len(record.classes)
    return torch.cat(found)


def _predictor(model: Classifier, records: list[Record], card: Mapping[str, Any]) -> Predictor:
    """The saved predictor, its own adapter by the slot that it has now."""
    if not card:
        if CLASS_KEYS not in model.parts:
            raise PoolError("neither a predictor nor keys were saved with this pool: pass predictor=...")
        return NearestKey()
    try:
        made = build(predictors.get(card["predictor"]["type"]), card["predictor"]["config"], "predictor")
        anchor = card["anchor"]
    except (KeyError, TypeError, ClAdaptersError) as error:
        raise PoolError(
            f"the predictor in {CARD} cannot be used ({error}): pass predictor=..., or delete it"
        ) from error
    if anchor is None:
        return made
    own = anchor_of(card, records)
    if own is None:
        hint = "predictor=NearestKey()" if CLASS_KEYS in model.parts else "another predictor="
        raise PoolError(
            f"{card['predictor']['type']!r} needs adapter {anchor[0]!r} for every input, which is not among these "
            f"records: pass {hint}, or SelfRefine(start='keys')"
        )
    changed: Any = made
    return dataclasses.replace(changed, slot=records.index(own))  # type: ignore[no-any-return]


def save_pool(
    model: Classifier,
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
        write_json(scratch / CARD, _card(model, pool, names))
    return AdapterPool.open(path, backbone=model.backbone)


def _new(
    model: Classifier,
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


def _check_by_class(model: Classifier) -> None:
    if not model.predictor.by_class:
        raise PoolError(
            f"a model that predicts by {predictors.name_of(model.predictor)!r} is no set of adapters with classes of "
            "their own, so it cannot be a pool: its answers need all its parts. Keep it with model.save(folder)"
        )
    check_own_keys(model)
    if not model.classes:
        raise PoolError("this model knows no class yet: train it on a task first")


def _groups(model: Classifier) -> Iterator[tuple[int, list[int]]]:
    """Each adapter with its columns; before them the tasks that the bare backbone answers for, one by one."""
    slots, tasks = model.slot_of_column.tolist(), model.newest_task_of_column.tolist()
    bare = {task: [c for c, slot in enumerate(slots) if slot == BARE and tasks[c] == task] for task in sorted({*tasks})}
    yield from ((BARE, columns) for columns in bare.values() if columns)
    for slot in range(model.num_slots):
        yield slot, [column for column, own in enumerate(slots) if own == slot]


def _task_of(model: Classifier, slot: int, columns: list[int]) -> int | None:
    if columns:
        return int(model.newest_task_of_column[columns].min())
    return model.task_of_slot[slot] if slot < len(model.task_of_slot) else None


def _ids(model: Classifier, slots: list[int]) -> list[str]:
    """Ids of the records: those that the adapters had in the pool that they came from; else the next free ones."""
    known = model.record_of_slot
    free = (id for id in (f"task-{number:03d}" for number in count()) if id not in known)
    return [known[slot] if 0 <= slot < len(known) else next(free) for slot in slots]


def _knowledge(model: Classifier, columns: list[int]) -> dict[str, Tensor]:
    """The rows of these classes."""
    found: dict[str, Tensor] = {}
    if not columns:
        return found
    if model.head.num_classes == len(model.classes):
        found |= {"head.weight": model.head.weight[columns], "head.bias": model.head.bias[columns]}
    if model.prototypes.num_classes == len(model.classes):
        found["prototypes"] = model.prototypes.prototypes[columns]
    if CLASS_KEYS in model.parts:
        keys = model.part(CLASS_KEYS, Keys)
        found["keys"], found["key_class"] = _rows_of_columns(keys.keys_MD, keys.column_M, columns)
        if keys.size_M is not None:
            found["key_size"], _ = _rows_of_columns(keys.size_M, keys.column_M, columns)
        found["held_out"], found["held_out_class"] = _rows_of_columns(keys.held_out_HD, keys.held_out_column_H, columns)
    elif "prototypes" in found and getattr(model.predictor, "slot", None) == BARE:
        found |= {"keys": found["prototypes"], "key_class": torch.arange(len(columns))}  # taken under the bare backbone
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def _rows_of_columns(rows_MD: Tensor, column_M: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of these columns, and the position of each one's column among them."""
    position = torch.full((max([*columns, *column_M.tolist()]) + 1,), -1)
    position[columns] = torch.arange(len(columns))
    place_M = position[column_M.cpu()]
    return rows_MD.cpu()[place_M >= 0], place_M[place_M >= 0]


def _card(model: Classifier, pool: AdapterPool, names: Mapping[int, str]) -> dict[str, Any]:
    """What the records do not say of a model.

    Args:
        model: what was saved.
        pool: its records.
        names: id of the record of each slot.

    Returns:
        JSON-ready. The predictor's own adapter is named by id and, should that change, by content.
    """
    anchor = model.predictor.anchor
    parts = dict(model.parts.items())
    threshold, keys = parts.get("abstention"), parts.get(CLASS_KEYS)
    return {
        "schema_version": SCHEMA,
        "predictor": {"type": predictors.name_of(model.predictor), "config": to_plain(model.predictor)},
        "anchor": None if anchor == BARE else [names[anchor], pool.get(names[anchor]).adapter_sha],
        "abstention": threshold.description() if isinstance(threshold, Abstention) else None,
        "keys": to_plain(keys.config) if isinstance(keys, Keys) else None,
    }
