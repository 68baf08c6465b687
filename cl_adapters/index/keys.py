"""Keys of an index: vectors that stand for the classes of a record, made from features in the pool's knowledge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
from torch import Tensor

from cl_adapters._seeding import derive
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.index.backends.base import Floats, Ids, finite_rows
from cl_adapters.index.space import Space, fit_space
from cl_adapters.parts.keys import DEFAULT_CENTROIDS, Kind

PER_CLASS = {"prototypes": 1, "centroids": DEFAULT_CENTROIDS, "features": None}
"""Keys of a class unless told otherwise; None: all there are."""


class KeyClass(Protocol):
    """One class of a record."""

    @property
    def label(self) -> int:
        """Its number in the benchmark."""

    @property
    def name(self) -> str | None:
        """Its name, where it has one."""


class KeyRecord(Protocol):
    """What an index wants of a record: :class:`~cl_adapters.pool.record.Record`, or anything like it."""

    @property
    def id(self) -> str:
        """Of the adapter."""

    @property
    def classes(self) -> Sequence[KeyClass]:
        """Row i of the knowledge belongs to class i."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Of the classes."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Words to select by."""

    @property
    def knowledge_sha(self) -> str | None:
        """SHA-256 of the file of keys; None: there is none."""


class KeySource(Protocol):
    """What an index wants of a pool: :class:`~cl_adapters.pool.pool.AdapterPool`, or anything like it."""

    @property
    def path(self) -> Path:
        """Folder of the pool."""

    @property
    def records(self) -> Sequence[KeyRecord]:
        """One per adapter."""

    @property
    def backbone(self) -> Any:
        """The frozen backbone, for queries by image."""

    def knowledge(self, id: str) -> dict[str, Tensor]:
        """What belongs to the classes of an adapter.

        Read here: "keys" float32 [M, D] and "key_class" int64 [M]; and, where the keys are centroids, "key_size" int64
        [M], how many features each is the mean of.
        """


@runtime_checkable
class LockedSource(Protocol):
    """A pool that has other writers, which can be kept out; one without this method has none."""

    def locked(self) -> AbstractContextManager[object]:
        """Be its only writer for a ``with`` block."""


def writing_into(folder: Path, pool: KeySource) -> AbstractContextManager[object]:
    """The lock of a pool, for who writes into its folder; of other places a pool knows nothing."""
    inside = folder.resolve().is_relative_to(Path(pool.path).resolve())
    return pool.locked() if inside and isinstance(pool, LockedSource) else nullcontext()


@dataclass(frozen=True, kw_only=True)
class KeyRule:
    """Which keys a class gets.

    Attributes:
        kind: "prototypes", the mean of its features; "centroids", the means of its clusters (k-means); "features",
            features drawn without repetition.
        per_class: how many at most; default 1, 4 and all.
        seed: of k-means and of the draw.
    """

    kind: Kind = "prototypes"
    per_class: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"unknown keys {self.kind!r}; known: {', '.join(get_args(Kind))}")
        if self.per_class is not None and self.per_class < 1:
            raise ConfigError(f"per_class must be at least 1, got {self.per_class}")
        if self.kind == "prototypes" and self.per_class not in (None, 1):
            raise ConfigError("a class has one prototype; for several keys per class take keys='centroids'")

    @property
    def limit(self) -> int | None:
        """Keys per class at most; None: no limit."""
        return PER_CLASS[self.kind] if self.per_class is None else self.per_class


def class_features(record: KeyRecord, knowledge: Mapping[str, Tensor]) -> Iterator[tuple[int, Floats, Ids | None]]:
    """The features of each class of a record.

    Yields:
        Label; features float32 [n, D] under the bare backbone, n at least 1; and, where these are centroids, of how
        many features each, int64 [n]. Classes without features are left out.

    Raises:
        DataError: keys that are not finite, or belong to no class.
    """
    if "keys" not in knowledge:
        return
    keys_MD = knowledge["keys"].detach().cpu().float().numpy()
    keys_MD = finite_rows(keys_MD, keys_MD.shape[-1], f"keys of {record.id!r}:")
    place_M = knowledge["key_class"].cpu().numpy()
    if len(place_M) != len(keys_MD) or (len(place_M) and not 0 <= place_M.min() <= place_M.max() < len(record.classes)):
        raise DataError(f"knowledge of {record.id!r}: key_class must name one of {len(record.classes)} classes per key")
    size_M = knowledge["key_size"].cpu().numpy() if "key_size" in knowledge else None
    for place, known in enumerate(record.classes):
        rows = place_M == place
        if rows.any():
            yield known.label, keys_MD[rows], None if size_M is None else size_M[rows]


def make_keys(record: KeyRecord, knowledge: Mapping[str, Tensor], rule: KeyRule, scaled: bool) -> tuple[Floats, Ids]:
    """Keys of one record, before projection; ``scaled``: cluster directions instead of positions, for the cosine.

    Returns:
        float32 [M, D] and labels int64 [M]; [0, 0] and [0] where the knowledge has no features.
    """
    parts = [
        (label, _keys_of_class(f_ND, size_N, rule, scaled, derive(rule.seed, "keys", record.id, label)))
        for label, f_ND, size_N in class_features(record, knowledge)
    ]
    if not parts:
        return np.empty((0, 0), np.float32), np.empty(0, np.int64)
    labels = np.concatenate([np.full(len(keys), label, np.int64) for label, keys in parts])
    return np.concatenate([keys for _, keys in parts]), labels


def space_of(pool: KeySource, records: list[KeyRecord], similarity: Any, keys_MD: Floats) -> Space:
    """The space in which the keys of these records are compared.

    Raises:
        DataError: "mahalanobis", and a record has centroids, around which the spread of the features is not known.
    """

    def features() -> Iterator[Floats]:
        for record in records:
            for label, f_ND, size_N in class_features(record, pool.knowledge(record.id)):
                if size_N is not None and (size_N > 1).any():
                    raise DataError(
                        f"metric 'mahalanobis' needs the features of each class, but {record.id!r} keeps centroids of "
                        f"class {label}, between which they vary less than features do. Train with keys='features', or "
                        "take metric='cosine'"
                    )
                yield f_ND

    return fit_space(similarity, keys_MD, features())


def digest(record: KeyRecord) -> str:
    """Changes when the keys of a record would: its features, or the labels of its classes."""
    content = json.dumps([record.knowledge_sha, [known.label for known in record.classes]])
    return hashlib.sha256(content.encode()).hexdigest()


def _keys_of_class(f_ND: Floats, size_N: Ids | None, rule: KeyRule, scaled: bool, seed: int) -> Floats:
    limit = len(f_ND) if rule.limit is None else min(rule.limit, len(f_ND))
    if rule.kind == "features":
        chosen = np.sort(np.random.default_rng(seed).choice(len(f_ND), limit, replace=False))
        return f_ND[chosen]
    cluster_N = _clusters(f_ND, size_N, limit, scaled, seed)
    members = [cluster_N == c for c in np.unique(cluster_N)]
    if size_N is None:
        means = [f_ND[own].mean(0, dtype=np.float64) for own in members]
    else:
        means = [np.average(f_ND[own].astype(np.float64), 0, weights=size_N[own]) for own in members]
    return np.stack(means).astype(np.float32)


def _clusters(f_ND: Floats, size_N: Ids | None, wanted: int, scaled: bool, seed: int) -> Ids:
    """Number of the cluster of each feature, int64 [N]; one with a size counts as often.

    Not :func:`cl_adapters.parts.keys.centroids`, whose single start and other draws would give an index other keys.
    """
    points_ND = Space(similarity="cosine", mean_D=np.zeros(1, np.float32)).project(f_ND) if scaled else f_ND
    wanted = min(wanted, len(np.unique(points_ND, axis=0)))
    if wanted == 1:
        return np.zeros(len(f_ND), np.int64)
    from sklearn.cluster import KMeans  # half a second that prototypes do not need

    found = KMeans(wanted, n_init=3, random_state=seed % 2**32).fit_predict(points_ND, sample_weight=size_N)
    cluster_N: Ids = found.astype(np.int64)
    return cluster_N
