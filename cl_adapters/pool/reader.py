"""PoolReader: what can be read of a pool, also while others write to it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cl_adapters.errors import PoolError
from cl_adapters.pool.checks import check_fingerprint, load_backbone
from cl_adapters.pool.disk import Disk
from cl_adapters.pool.manifest import BackboneCard, Broken
from cl_adapters.pool.record import Record
from cl_adapters.pool.store import load_adapter, load_knowledge
from cl_adapters.pool.verify import Verification, verify_files

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.backbones.frozen import FrozenBackbone

T = TypeVar("T")
P = TypeVar("P", bound="PoolReader")


class PoolReader:
    """The reading half of :class:`cl_adapters.AdapterPool`; arguments and errors are told there."""

    def __init__(
        self,
        path: str | Path,
        *,
        backbone: FrozenBackbone | None = None,
        limit: int = 64,
        timeout: float = 30.0,
    ) -> None:
        if limit < 0:
            raise PoolError(f"limit is the number of adapters kept in memory, got {limit}")
        self.path = Path(path)
        self.limit = limit
        self._disk = Disk(self.path, timeout)
        self._backbone: FrozenBackbone | None = None
        self._loaded: OrderedDict[object, dict[str, Tensor]] = OrderedDict()
        self._guard = threading.Lock()
        card = self._disk.manifest().backbone
        if backbone is not None:
            check_fingerprint(card, backbone, "backbone")
            self._backbone = backbone

    @classmethod
    def open(
        cls: type[P],
        path: str | Path,
        *,
        backbone: FrozenBackbone | None = None,
        limit: int = 64,
        timeout: float = 30.0,
    ) -> P:
        """Open a pool; arguments and errors as for the class."""
        return cls(path, backbone=backbone, limit=limit, timeout=timeout)

    @property
    def backbone_card(self) -> BackboneCard:
        """Name, source, fingerprint, width and preprocessing of the backbone, without loading it."""
        return self._disk.manifest().backbone

    @property
    def backbone(self) -> FrozenBackbone:
        """The backbone, loaded on first use.

        Raises:
            IncompatibleBackbone: it has to be given to :meth:`open`; or its source gives another one today.
            BackboneUnavailable: its weights cannot be had here.
        """
        with self._guard:
            if self._backbone is None:
                self._backbone = load_backbone(self._disk.manifest().backbone)
                self._loaded.clear()  # what was loaded before was not checked against its sites
            return self._backbone

    @property
    def records(self) -> tuple[Record, ...]:
        """What is known of each adapter, oldest first; broken records are left out."""
        return self._disk.manifest().records

    @property
    def broken(self) -> tuple[Broken, ...]:
        """Records that cannot be used, with the reason; :meth:`remove` takes their ids too."""
        return self._disk.manifest().broken

    @property
    def ids(self) -> tuple[str, ...]:
        """The adapters' ids, oldest first."""
        return tuple(record.id for record in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, id: object) -> bool:
        return isinstance(self._disk.manifest().by_id.get(str(id)), Record)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} adapters of {self.backbone_card.name!r})"

    def get(self, id: str) -> Record:
        """The record of one adapter.

        Raises:
            UnknownName: there is none of that id; names the nearest.
            PoolError: its record is broken.
        """
        return self._disk.manifest().get(id)

    def list(
        self, tags: Sequence[str] = (), classes: Sequence[int] = (), type: str | None = None
    ) -> tuple[Record, ...]:
        """Records by filter.

        Args:
            tags: those with all of these.
            classes: those that know at least one of these labels.
            type: those of that adapter type, such as "bottleneck".
        """
        return tuple(
            record
            for record in self.records
            if set(tags) <= set(record.tags)
            and (not classes or set(classes) & set(record.labels))
            and (type is None or (record.adapter or {}).get("type") == type)
        )

    def tensors(self, id: str) -> dict[str, Tensor]:
        """The tensors of one adapter; do not write into them, they are kept for the next caller.

        Returns:
            float32, keyed "blocks.3.ffn/down", decompressed; empty where the bare backbone answers.

        Raises:
            UnknownName: no such adapter.
            PoolError: its file is missing, altered, or not what its record says.
        """
        return self._read(id, self._load)

    def knowledge(self, id: str) -> dict[str, Tensor]:
        """The rows of one adapter's classes; see :data:`cl_adapters.pool.checks.KNOWLEDGE`. Empty where it has none.

        Raises:
            UnknownName: no such adapter.
            PoolError: its file is missing, altered, or not what its record says.
        """
        return self._read(id, partial(load_knowledge, self.path, self.backbone_card))

    def verify(self) -> Verification:
        """Check the manifest, every file's SHA-256 and form, model.json, and shapes where the backbone is at hand."""
        while True:
            try:
                manifest = self._disk.manifest()
            except PoolError as error:
                return Verification(False, (str(error),), ())
            found = verify_files(self.path, manifest, self._backbone)
            if found.ok or self._disk.manifest() == manifest:
                return found  # otherwise a writer was at work meanwhile

    def _loadable(self) -> FrozenBackbone | None:
        """The backbone; None where it is a wrapped module that was not given."""
        return self.backbone if self._backbone is not None or self.backbone_card.source else None

    def _read(self, id: str, load: Callable[[Record], T]) -> T:
        """Readers take no lock. Where a file is gone, a writer may have replaced it: the newer record counts."""
        while True:
            record = self.get(id)
            try:
                return load(record)
            except PoolError:
                if self.get(id) == record:
                    raise

    def _load(self, record: Record) -> dict[str, Tensor]:
        key = (record.adapter_sha, record.compression, repr(record.adapter), record.num_parameters)
        with self._guard:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return dict(self._loaded[key])
            backbone = self._backbone
        tensors = load_adapter(self.path, record, backbone)
        with self._guard:
            if self._backbone is backbone:
                self._loaded[key] = tensors
            while len(self._loaded) > self.limit:
                self._loaded.popitem(last=False)
        return dict(tensors)
