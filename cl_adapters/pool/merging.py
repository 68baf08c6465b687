"""Merging records of a pool into a new one: their tensors by a merge method, the rows of their classes side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_adapters.errors import ConfigError, PoolError
from cl_adapters.merge.adapters import MergeReport, merge_adapters
from cl_adapters.pool.checks import PER_CLASS, PER_KEY, TOGETHER, adapter_of
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import PoolClass, Record


@dataclass(frozen=True, kw_only=True)
class MergedRecord:
    """What :func:`merge_records` made.

    Attributes:
        record: of the merged adapter.
        report: how it came about, with the error of the truncation.
        notes: what of the parents' knowledge could not be joined, a line each.
    """

    record: Record
    report: MergeReport
    notes: tuple[str, ...]


def merge_records(
    pool: AdapterPool,
    ids: Sequence[str],
    method: str = "mean",
    options: Mapping[str, Any] | None = None,
    *,
    id: str | None = None,
    base: str | None = None,
    rank: int | None = None,
    tags: Sequence[str] = (),
    compression: str | None = None,
    metrics: Mapping[str, float] | None = None,
    into: AdapterPool | None = None,
) -> MergedRecord:
    """Merge adapters into a new record, in one step; the parents stay.

    Tensors as in :func:`cl_adapters.merge.adapters.merge_adapters`: types with a delta exactly, others only within one
    lineage, that is, where one of the adapters, or an ancestor, is an ancestor of all (or one of them). The classes
    are the union. Keys and held-back features were taken under the bare backbone, prototypes under the predictor's own
    adapter, so these stay right as they are; rows of the linear head were trained under the parents and serve the
    merged adapter only about as well as it resembles them. A class of several parents keeps all its keys, and the mean
    of its rows.

    Args:
        pool: has the parents.
        ids: the parents, at least two.
        method: of ``cl-adapters list merges``.
        options: of the method.
        id: of the new record; default the first free of "task-000", ...
        base: id of the adapter that all were trained from, for methods that take a base.
        rank: of the result, for types with a delta; default the largest.
        tags: of the new record.
        compression: codec of the stored tensors.
        metrics: measured for the new record.
        into: another pool of the same backbone that gets the record; default ``pool``.

    Raises:
        UnknownName: no such adapter or method.
        PoolError: fewer than two adapters, one given twice, or one without tensors; the id is taken.
        ConfigError: options that do not go with method and type, or adapters that only a lineage could merge.
    """
    parents = [pool.get(one) for one in ids]
    if len(parents) < 2 or len({*ids}) < len(ids):
        raise PoolError(f"merging needs two or more different adapters, got {', '.join(ids) or 'none'}")
    start = None if base is None else pool.get(base)
    used = parents if start is None else [*parents, start]
    merged = merge_adapters(
        [pool.tensors(record.id) for record in parents],
        [_adapter(record) for record in parents],
        method,
        options,
        base=None if start is None else pool.tensors(start.id),
        rank=rank,
        lineage=one_lineage(pool, used),
    )
    classes, knowledge, notes = _joined([(record, pool.knowledge(record.id)) for record in parents])
    origins = {record.benchmark for record in parents}
    target = pool if into is None else into  # an empty pool is false
    record = target.add(
        merged.tensors,
        merged.adapter,
        classes,
        id=id,
        knowledge=knowledge or None,
        tags=tags,
        parents=list(dict.fromkeys(record.id for record in used)),
        merge=merged.report.to_plain() | ({} if base is None else {"base": base}),
        compression=compression,
        benchmark=origins.pop() if len(origins) == 1 else None,
        metrics=metrics,
    )
    return MergedRecord(record=record, report=merged.report, notes=notes)


def recorded_metric(records: Sequence[Record], name: str) -> list[float]:
    """A metric of each record, as weights of a merge.

    Raises:
        ConfigError: one of them does not record it.
    """
    without = [record.id for record in records if name not in record.metrics]
    if without:
        known = sorted({metric for record in records for metric in record.metrics})
        raise ConfigError(f"{', '.join(without)} has no {name!r}; recorded: {', '.join(known) or 'none'}")
    return [record.metrics[name] for record in records]


def one_lineage(pool: AdapterPool, records: Sequence[Record]) -> bool:
    """Whether all come from one adapter: one of them, or an ancestor by ``Record.parents``, also one that is gone."""
    known = {record.id: record for record in pool.records}
    lines = []
    for record in records:
        line, news = {record.id}, set(record.parents)
        while news:
            line |= news
            news = {parent for id in news if id in known for parent in known[id].parents} - line
        lines.append(line)
    return bool(set.intersection(*lines))


def _adapter(record: Record) -> Any:
    adapter = adapter_of(record)
    if adapter is None:
        raise PoolError(f"{record.id!r} is answered by the bare backbone: there are no tensors to merge")
    return adapter


def _joined(
    known: Sequence[tuple[Record, Mapping[str, Tensor]]],
) -> tuple[list[PoolClass], dict[str, Tensor], tuple[str, ...]]:
    """The union of the classes, the rows that all records with classes have, and what had to be left out."""
    known = [(record, rows) for record, rows in known if record.classes]
    classes: dict[int, PoolClass] = {}
    for record, _ in known:
        for one in record.classes:
            before = classes.setdefault(one.label, one)
            if before.name != one.name:
                raise PoolError(
                    f"class {one.label} is {before.name!r} in one adapter and {one.name!r} in {record.id!r}: these "
                    "labels are not of one benchmark"
                )
    place_of = {label: place for place, label in enumerate(classes)}
    places = [torch.tensor([place_of[label] for label in record.labels]) for record, _ in known]
    if any("key_size" in rows for _, rows in known):  # other keys count as one feature each
        known = [
            (record, {"key_size": torch.ones_like(rows["key_class"]), **rows} if "keys" in rows else rows)
            for record, rows in known
        ]
    joined: dict[str, Tensor] = {}
    for key in PER_CLASS:
        if known and all(key in rows for _, rows in known):
            joined[key] = _mean_rows([rows[key] for _, rows in known], places, len(classes))
    for of_class, keys in PER_KEY.items():
        if known and all(of_class in rows for _, rows in known):
            joined |= {key: torch.cat([rows[key] for _, rows in known]) for key in keys if key in known[0][1]}
            joined[of_class] = torch.cat(
                [place[rows[of_class]] for place, (_, rows) in zip(places, known, strict=True)]
            )
    return list(classes.values()), joined, tuple(_left_out(known, joined))


def _mean_rows(rows: Sequence[Tensor], places: Sequence[Tensor], classes: int) -> Tensor:
    """Rows [C_t, ...] of every record at the places of their classes, [C, ...]; several of one class: their mean."""
    place, all_rows = torch.cat(list(places)), torch.cat(list(rows))
    sums = torch.zeros(classes, *all_rows.shape[1:]).index_add(0, place, all_rows)
    counts = place.bincount(minlength=classes)
    return sums / counts.reshape(-1, *[1] * (all_rows.ndim - 1))


def _left_out(known: Sequence[tuple[Record, Mapping[str, Tensor]]], joined: Mapping[str, Tensor]) -> Iterator[str]:
    seconds = {"key_size", *(second for _, second in TOGETHER)}
    for key in dict.fromkeys(key for _, rows in known for key in rows if key not in seconds):
        if key not in joined:
            without = [record.id for record, rows in known if key not in rows]
            yield f"{key} left out: {', '.join(without)} has none"
    if "keys" not in joined:
        yield "without keys the index cannot find the merged adapter"
