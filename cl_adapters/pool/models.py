"""A model of a pool's records; the other way is :mod:`cl_adapters.pool.model_records`.

Record i is slot i and task i of the model; one that the bare backbone answers for is a slot that adds nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Loader
from cl_adapters.config import build
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.origins import Origin
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.keys import Keys, KeysConfig
from cl_adapters.pool.checks import adapter_of
from cl_adapters.pool.model_card import CARD, anchor_of, read_card
from cl_adapters.pool.model_records import save_pool
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import Record
from cl_adapters.predictors.base import Predictor, predictors
from cl_adapters.predictors.nearest_key import NearestKey

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex

__all__ = ["from_pool", "save_pool"]


def from_pool(
    pool: AdapterPool | str | Path,
    ids: Sequence[str] | None = None,
    *,
    backbone: FrozenBackbone | None = None,
    predictor: Predictor | None = None,
    index: AdapterIndex | str | Path | None = None,
    limit: int = 64,
) -> AdapterModel:
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
        pool: a pool, or its folder.
        ids: the records; default all.
        backbone: where it is at hand; default the pool's.
        predictor: another inference rule than the one that was saved. A pool without a saved one gets
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
    model = AdapterModel(backbone or pool.backbone, _bank(pool, records, backbone or pool.backbone, limit))
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
        rows, of = found["keys"].float(), found["key_class"]
        sums_CD = rows.new_zeros(len(record.classes), rows.shape[1]).index_add(0, of, rows)
        means_CD = sums_CD / of.bincount(minlength=len(record.classes)).clamp_min(1)[:, None]
        found = {key: value for key, value in found.items() if not key.startswith(("key", "held_out"))}
        found["keys"] = means_CD
    return found


def _fill_heads(model: AdapterModel, known: list[tuple[Record, dict[str, Tensor]]]) -> None:
    weight, bias, prototypes = (_column(known, key) for key in ("head.weight", "head.bias", "prototypes"))
    groups = tuple(len(record.classes) for record, _ in known)
    model.head.groups = model.prototypes.groups = groups  # no record's logits depend on which others there are
    if weight is not None and bias is not None:
        model.head.weight, model.head.bias = nn.Parameter(weight), nn.Parameter(bias)
    if prototypes is not None:
        model.prototypes.prototypes = prototypes


def _fill_keys(model: AdapterModel, known: list[tuple[Record, dict[str, Tensor]]], card: Mapping[str, Any]) -> None:
    """Keys, and the saved thresholds."""
    rows = _column(known, "keys")
    if rows is None:
        return
    alone = {"kind": "prototypes", "held_out": 0.0} if len(rows) == len(model.classes) else {"kind": "features"}
    model.parts["class_keys"] = keys = Keys(build(KeysConfig, card.get("keys") or alone, "keys"), rows.shape[1])
    keys.keys_MD, keys.column_M = rows, _columns(known, "key_class")
    if any("held_out" in knowledge for _, knowledge in known):
        keys.held_out_HD = torch.cat([knowledge["held_out"] for _, knowledge in known if "held_out" in knowledge])
        keys.held_out_column_H = _columns(known, "held_out_class")
    if card.get("abstention"):
        model.parts["abstention"] = Abstention.restore(card["abstention"], {})


def _look_up(
    model: AdapterModel,
    pool: AdapterPool,
    index: AdapterIndex | str | Path,
    known: list[tuple[Record, dict[str, Tensor]]],
) -> None:
    """An index in the place of keys, and its threshold."""
    from cl_adapters.pool.indexed_keys import IndexedKeys, open_index

    records = [record for record, _ in known]
    opened, means_CD = open_index(pool, index, records), _column(known, "keys")
    if means_CD is None:
        raise PoolError(f"no adapter of {pool.path} has keys: there is nothing to look up; leave index= out")
    model.parts["class_keys"] = IndexedKeys(opened, records, means_CD)
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


def _predictor(model: AdapterModel, records: list[Record], card: Mapping[str, Any]) -> Predictor:
    """The saved inference rule, its own adapter by the slot that it has now."""
    if not card:
        if "class_keys" not in model.parts:
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
        hint = "predictor=NearestKey()" if "class_keys" in model.parts else "another predictor="
        raise PoolError(
            f"{card['predictor']['type']!r} needs adapter {anchor[0]!r} for every input, which is not among these "
            f"records: pass {hint}, or SelfRefine(start='keys')"
        )
    changed: Any = made
    return dataclasses.replace(changed, slot=records.index(own))  # type: ignore[no-any-return]
