"""What an index back-end is: vectors with integer ids, and the nearest of them to a query.

Back-ends know two metrics, inner product and squared Euclidean distance; cosine and Mahalanobis are made from them by
:mod:`cl_adapters.index.space`. On disk every back-end is plain NumPy arrays and JSON: no file of a native library is
ever read, so a damaged or hostile one cannot reach native code.

Shapes: M vectors, B queries, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch

from cl_adapters import config
from cl_adapters._io import read_json, write_json
from cl_adapters.errors import ConfigError, DataError, StorageError
from cl_adapters.index.arrays import read_array, write_array
from cl_adapters.registry import Registry

Floats: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.int64]
Metric = Literal["ip", "l2"]

SCHEMA_VERSION = 1
Back = TypeVar("Back", bound="IndexBackend")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A back-end that has nothing to choose."""


class IndexBackend(ABC):
    """Base of the back-ends. A subclass adds its ``Options`` (a frozen dataclass) and the methods with an underscore.

    Searching is safe from several threads at once; ``add`` and ``remove`` must run alone
    (:class:`~cl_adapters.index.index.AdapterIndex` sees to it).

    Attributes:
        ids_M: int64 [M], ids of the stored vectors in the order in which they came.
        threads: CPU threads of a search; None: as many as torch uses.
        exact: whether the answers are those of a full scan of the vectors as given.
        rounded: whether vectors are kept with fewer bits, so that scores are off by the rounding.
    """

    summary: ClassVar[str] = ""
    Options: ClassVar[type[Any]] = NoOptions
    exact: ClassVar[bool] = False
    rounded: ClassVar[bool] = False

    def __init__(self, width: int, metric: Metric, options: Any = None, seed: int = 0) -> None:
        if metric not in get_args(Metric):
            raise ConfigError(f"an index back-end knows the metrics {', '.join(get_args(Metric))}, got {metric!r}")
        options = self.Options() if options is None else options
        if not isinstance(options, self.Options):
            raise ConfigError(f"options of {type(self).__name__}: expected {self.Options.__name__}, got {options!r}")
        self.width, self.metric, self.options, self.seed = width, metric, options, seed
        self.threads: int | None = None
        self.ids_M: Ids = np.empty(0, np.int64)

    @classmethod
    def build(
        cls: type[Back], vectors_MD: Floats, ids_M: Ids, *, metric: Metric, options: Any = None, seed: int = 0
    ) -> Back:
        """Make an index of vectors.

        Args:
            vectors_MD: float32 [M, D], finite; M may be 0.
            ids_M: int64 [M], distinct, not negative.
            metric: "ip" (score = inner product) or "l2" (score = minus the squared distance); higher is better.
            options: an instance of ``Options``; default its defaults.
            seed: of everything that is drawn; the same arguments give the same index.

        Raises:
            DataError: vectors or ids that are not as above.
            ConfigError: unknown metric or wrong options.
        """
        index = cls(np.shape(vectors_MD)[-1], metric, options, seed)
        vectors_MD, ids_M = index._checked(vectors_MD, ids_M)
        index._build(vectors_MD, ids_M)
        index.ids_M = ids_M
        return index

    def __len__(self) -> int:
        return len(self.ids_M)

    def add(self, ids: Ids, vectors: Floats) -> None:
        """Add vectors.

        Args:
            ids: int64 [M'], distinct, not negative, none of them stored already.
            vectors: float32 [M', D], finite.

        Raises:
            DataError: vectors or ids that are not as above.
        """
        vectors, ids = self._checked(vectors, ids)
        if len(ids):
            self._add(vectors, ids)
            self.ids_M = np.concatenate([self.ids_M, ids])

    def remove(self, ids: Ids) -> None:
        """Remove vectors.

        Raises:
            DataError: an id that is not stored.
        """
        ids = np.unique(np.asarray(ids, np.int64))
        missing = ids[~np.isin(ids, self.ids_M)]
        if len(missing):
            raise DataError(f"the index has no vector with the id {missing[0]}; nothing was removed")
        if len(ids):
            self._remove(ids)
            self.ids_M = self.ids_M[~np.isin(self.ids_M, ids)]

    def search(self, queries_BD: Floats, k: int, allowed: Ids | None = None) -> tuple[Floats, Ids]:
        """The k best vectors for every query.

        Args:
            queries_BD: float32 [B, D], finite.
            k: at least 1.
            allowed: int64; only these ids may be found. None: all.

        Returns:
            scores float32 [B, k], best first, and ids int64 [B, k]; where fewer than k vectors may be found, the rest
            of the row is minus infinity and -1. Of equal scores any order.

        Raises:
            DataError: queries of another width, or not finite.
            ConfigError: k below 1.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        queries_BD = finite_rows(queries_BD, self.width, "queries")
        if allowed is not None:
            allowed = np.unique(np.asarray(allowed, np.int64))
            allowed = allowed[np.isin(allowed, self.ids_M)]
            allowed = None if len(allowed) == len(self) else allowed
        found = min(k, len(self) if allowed is None else len(allowed))
        scores = np.full((len(queries_BD), k), -np.inf, np.float32)
        ids = np.full((len(queries_BD), k), -1, np.int64)
        if found and len(queries_BD):
            scores[:, :found], ids[:, :found] = self._search(queries_BD, found, allowed)
        return scores, ids

    def save(self, folder: Path) -> None:
        """Write the index into an existing, empty folder."""
        description = {
            "schema_version": SCHEMA_VERSION,
            "backend": indexes.name_of(self),
            "width": self.width,
            "metric": self.metric,
            "options": config.to_plain(self.options),
            "seed": self.seed,
            "state": dict(self._state()),
        }
        write_json(folder / "backend.json", description)
        write_array(folder / "ids.npy", self.ids_M)
        self._save(folder)

    @staticmethod
    def load(folder: Path, *, mmap: bool = True) -> IndexBackend:
        """Open a saved index, of whichever back-end it is.

        Args:
            folder: what :meth:`save` wrote.
            mmap: leave the vectors on disk where the back-end can, and read what a search touches.

        Raises:
            StorageError: missing, truncated or contradictory files.
        """
        description = read_json(folder / "backend.json", schema_version=SCHEMA_VERSION)
        try:
            cls = indexes.get(description["backend"])
            options = config.build(cls.Options, description["options"], "index")
            index = cls(int(description["width"]), description["metric"], options, int(description["seed"]))
            index.ids_M = read_array(folder / "ids.npy", np.int64, (None,), mmap=False)
            index._load(folder, description["state"], mmap)
        except StorageError:
            raise
        except Exception as error:  # numbers that contradict each other surface in many ways
            raise StorageError(
                f"{folder} is no usable index ({type(error).__name__}: {error}); rebuild it from the pool"
            ) from error
        return index

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the index takes in memory, or on disk where it is memory-mapped."""

    @abstractmethod
    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        """Train if need be, and take the first vectors (perhaps none)."""

    @abstractmethod
    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        """Take more vectors; ``self.ids_M`` is still without them."""

    @abstractmethod
    def _remove(self, ids: Ids) -> None:
        """Drop stored vectors; ``self.ids_M`` still has them."""

    @abstractmethod
    def _search(self, queries_BD: Floats, k: int, allowed: Ids | None) -> tuple[Floats, Ids]:
        """As :meth:`search`, where at least k vectors may be found and ``allowed`` is sorted and stored."""

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write the arrays."""

    @abstractmethod
    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        """Read the arrays; ``self.ids_M`` is set already."""

    def _state(self) -> Mapping[str, Any]:
        """Numbers to save beside the options."""
        return {}

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _checked(self, vectors: Floats, ids: Ids) -> tuple[Floats, Ids]:
        vectors = finite_rows(vectors, self.width, "vectors")
        ids = np.array(ids, np.int64)
        if ids.shape != vectors.shape[:1]:
            raise DataError(f"{len(vectors)} vectors need as many ids, got an array of shape {list(ids.shape)}")
        if len(ids) and (ids.min() < 0 or len(np.unique(ids)) < len(ids) or np.isin(ids, self.ids_M).any()):
            raise DataError("ids must be distinct, not negative, and not yet in the index")
        return vectors, ids


def finite_rows(rows: Any, width: int, what: str) -> Floats:
    """Check and convert to C-contiguous float32 [N, width].

    Raises:
        DataError: another shape or type, or a value that is not finite (in float32).
    """
    array = np.asarray(rows)
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{what} must be [N, {width}], the width of the index; got {list(array.shape)}")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} must be real numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    # Blocks, so that a memory-mapped array is not held twice.
    for start in range(0, len(array), 1 << 16):
        good = np.isfinite(array[start : start + (1 << 16)]).all(1)
        if not good.all():
            row = start + int(np.flatnonzero(~good)[0])
            raise DataError(f"{what} row {row} is not finite; check the image or the file that it comes from")
    return array


indexes: Registry[type[IndexBackend]] = Registry(
    "index back-end", "cl_adapters.index.backends", group="cl_adapters.index"
)
