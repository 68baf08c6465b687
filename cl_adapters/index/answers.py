"""What users give to an index of a pool, and what they get from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cl_adapters import config
from cl_adapters.errors import ConfigError
from cl_adapters.index.backends.base import indexes
from cl_adapters.index.keys import KeyRule
from cl_adapters.index.space import Similarity, check_similarity


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Everything that, with the pool, determines an index.

    Attributes:
        rule: which keys a class gets.
        metric: how features are compared.
        backend: registered name, or "auto".
        options: of that back-end.
        tags: only records that have all of these.
    """

    rule: KeyRule = field(default_factory=KeyRule)
    metric: Similarity = "cosine"
    backend: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_similarity(self.metric)
        if self.backend != "auto":
            config.build(indexes.get(self.backend).Options, self.options, f"index {self.backend}")
        elif self.options:
            raise ConfigError("options belong to one back-end, so name it: backend='ivf', options={'probes': 8}")


@dataclass(frozen=True)
class Hit:
    """One key that was found.

    Attributes:
        record: id of the adapter.
        label: of the class.
        name: of the class, where the pool knows one.
        score: higher is nearer; the cosine, the inner product, or minus a squared distance.
    """

    record: str
    label: int
    name: str | None
    score: float


@dataclass(frozen=True)
class Neighbours:
    """What a search found, as arrays; k keys per query, best first.

    Attributes:
        scores: float32 [B, k]; minus infinity where fewer were found.
        records: int64 [B, k], positions in ``ids``; -1 where fewer were found.
        labels: int64 [B, k]; meaningless where ``records`` is -1.
        ids: ids of all records; None where a record was removed from the index.
    """

    scores: Tensor
    records: Tensor
    labels: Tensor
    ids: tuple[str | None, ...]

    def named(self, names: Mapping[tuple[str, int], str | None]) -> list[list[Hit]]:
        """As lists of hits, the empty places left out; ``names``: of the classes, by record id and label."""
        answers: list[list[Hit]] = []
        for scores, places, labels in zip(
            self.scores.tolist(), self.records.tolist(), self.labels.tolist(), strict=True
        ):
            answer = []
            for score, place, label in zip(scores, places, labels, strict=True):
                id = None if place < 0 else self.ids[place]
                if id is not None:
                    answer.append(Hit(id, label, names.get((id, label)), score))
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class Changes:
    """How a pool differs from its index.

    Attributes:
        added: records that the index does not have.
        removed: records that the pool does not have (any more, or not with the index's tags).
        altered: records with other features or labels.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.altered)

    def __str__(self) -> str:
        parts = [f"{len(ids)} {what} ({some(ids)})" for what, ids in vars(self).items() if ids]
        return "; ".join(parts) or "none"


@dataclass(frozen=True)
class IndexStats:
    """Figures of an index.

    Attributes:
        keys: number of vectors.
        records: adapters, those without keys included.
        classes: pairs of adapter and label that have a key.
        width: D; None while there is no key, like ``backend`` and ``bytes_per_key``.
        metric: how features are compared.
        rule: which keys a class gets, in words.
        backend: registered name of the one in use.
        nbytes: bytes of the back-end, in memory or memory-mapped.
        bytes_per_key: ``nbytes`` per key.
        without_keys: adapters whose knowledge has no features.
        changes: how the pool differs from the index.
        threshold: see :attr:`cl_adapters.index.index.AdapterIndex.threshold`.
        threshold_stale: whether it was calibrated on other keys.
    """

    keys: int
    records: int
    classes: int
    width: int | None
    metric: str
    rule: str
    backend: str | None
    nbytes: int
    bytes_per_key: float | None
    without_keys: tuple[str, ...]
    changes: Changes
    threshold: float | None
    threshold_stale: bool = False


def some(ids: Sequence[str]) -> str:
    """A few of these ids, for a message."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
