"""AdapterPool: adapters on disk, with what belongs to their classes.

    manifest.json                  schema, backbone, one record per adapter
    adapters/<sha256>.safetensors  tensors keyed "blocks.3.ffn/down"; the same adapter twice is one file
    knowledge/<sha256>.safetensors rows of the record's classes: keys, heads, prototypes
    index/                         derived from the rest, and looked at by ``verify`` only

A change writes new files first, then the manifest in one step, then deletes what nothing names any more: a crash
leaves the old state or the new one, and perhaps files without a record, which ``gc`` removes.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl_adapters._forms import shown
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.errors import PoolError
from cl_adapters.pool import edit, transfer
from cl_adapters.pool.blobs import FOLDERS, delete, orphans, sha_of
from cl_adapters.pool.checks import adapter_of, load_backbone
from cl_adapters.pool.disk import LOCK, Disk, locked
from cl_adapters.pool.edit import NewAdapter
from cl_adapters.pool.manifest import MANIFEST, Broken, Manifest, write_manifest
from cl_adapters.pool.record import PoolClass, Record
from cl_adapters.pool.store import load_adapter, load_knowledge, named_codec, pack_knowledge
from cl_adapters.pool.verify import Verification, verify_files

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.adapters.base import AdapterType
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.codecs import Codec

T = TypeVar("T")
P = TypeVar("P", bound="AdapterPool")


class AdapterPool:
    """Adapters of one backbone on disk: many readers, one writer at a time.

    Opening reads the manifest only. Every read sees the newest state that a writer finished, also those of other
    processes. Methods may be called from several threads.

    Args:
        path: folder of the pool; see also :meth:`create`.
        backbone: the backbone, where it is at hand; default loaded on first use from its recorded source.
        limit: adapters that are kept in memory after use, the least recently used go first; 0 keeps none.
        timeout: seconds that a change waits while another process writes.

    Raises:
        PoolError: no pool there, or its manifest is damaged or of a newer schema.
        IncompatibleBackbone: ``backbone`` is not the one that the adapters were trained on.
    """

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
            card.check(backbone)
            self._backbone = backbone

    @classmethod
    def create(
        cls, path: str | Path, backbone: FrozenBackbone, *, limit: int = 64, timeout: float = 30.0
    ) -> AdapterPool:
        """Make an empty pool in a folder that does not exist, or is empty; options as for the class.

        Raises:
            PoolError: something is there already, or the place cannot be written.
        """
        pool = Path(path)
        try:
            pool.mkdir(parents=True, exist_ok=True)
            with locked(pool, timeout):
                present = {entry.name for entry in pool.iterdir()} - {LOCK, *FOLDERS}
                if any(not name.startswith(f".{MANIFEST}.") for name in present):  # those: a killed create
                    what = "a pool already; open it" if MANIFEST in present else "not empty; choose another place"
                    raise PoolError(f"{pool} is {what}")
                for folder in FOLDERS:
                    (pool / folder).mkdir(exist_ok=True)
                write_manifest(pool, Manifest(BackboneCard.of(backbone)))
        except PoolError:
            raise
        except OSError as error:
            raise PoolError(f"cannot make a pool at {pool}: {error.strerror or error}") from error
        return cls(pool, backbone=backbone, limit=limit, timeout=timeout)

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
        """Records with all of these tags, at least one of these class labels, and this adapter type ("bottleneck")."""
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

    def add(
        self,
        tensors: Mapping[str, Tensor],
        adapter: AdapterType | None,
        classes: Iterable[PoolClass],
        *,
        id: str | None = None,
        knowledge: Mapping[str, Tensor] | None = None,
        tags: Iterable[str] = (),
        parents: Iterable[str] = (),
        merge: Mapping[str, Any] | None = None,
        compression: str | Codec | None = None,
        benchmark: str | None = None,
        metrics: Mapping[str, float] | None = None,
        task: int | None = None,
    ) -> Record:
        """Add one adapter; returns its record.

        Args:
            tensors: as from ``AdapterBank.export``; float32, or half precision (stored as float32).
            adapter: its type with options; None, with no tensors: the bare backbone answers for these classes.
            classes: what it was trained on.
            id: default the first free of "task-000", "task-001", ...
            knowledge: rows of the classes; see :data:`cl_adapters.pool.checks.KNOWLEDGE`.
            tags: see :class:`Record`, as for the rest.
            parents: ids that it was made of.
            merge: how it was merged.
            compression: codec that the stored tensors go through, by name or with options; None stores float32.
            benchmark: where the training data came from.
            metrics: measured now.
            task: number of its task.

        Raises:
            PoolError: tensors that are not the type's at the backbone's sites, an id that is taken, bad values.
        """
        new = NewAdapter(
            tensors=tensors,
            adapter=adapter,
            classes=classes,
            id=id,
            knowledge=knowledge,
            tags=tags,
            parents=parents,
            merge=merge,
            compression=compression,
            benchmark=benchmark,
            metrics=metrics,
            task=task,
        )
        return edit.add(self._disk, [self._addition(new)])[0]

    def add_all(self, adapters: Iterable[NewAdapter]) -> tuple[Record, ...]:
        """Add several adapters with one new manifest: all of them, or none where one cannot be.

        They are taken one by one, each stored before the next is asked for; nobody else can write meanwhile.

        Raises:
            PoolError: as for :meth:`add`.
        """
        return edit.add(self._disk, map(self._addition, adapters))

    def replace(
        self,
        record: Record,
        tensors: Mapping[str, Tensor] | None = None,
        knowledge: Mapping[str, Tensor] | None = None,
        *,
        codec: Codec | None = None,
    ) -> Record:
        """Change one adapter in one step: its record, its tensors, its knowledge, or all; returns the new record.

        Args:
            record: the new record, made from the present one with ``dataclasses.replace``; its id says which.
                ``knowledge_sha=None`` drops the knowledge.
            tensors: new tensors, not compressed (``record.compression`` says how they are stored); default as they are.
            knowledge: new rows; needed when the number of classes edit.
            codec: for the new tensors, where its options are not the defaults; the record then names it.

        Raises:
            UnknownName: no such adapter.
            PoolError: values that do not fit together; or another writer has replaced its files meanwhile.
        """
        adapter = rows = None
        if tensors is not None:
            codec, compressed = named_codec(codec or record.compression)
            packed = edit.pack(tensors, adapter_of(record), codec, lambda: self.backbone)
            if packed is not None:
                adapter = packed.content
                record = dataclasses.replace(
                    record,
                    adapter_sha=packed.sha,
                    blocks=packed.blocks,
                    num_parameters=packed.num_parameters,
                    compression=compressed,
                )
        if knowledge is not None:
            rows = pack_knowledge(knowledge, len(record.classes), self.backbone_card)
            record = dataclasses.replace(record, knowledge_sha=sha_of(rows))
        return edit.replace(self._disk, record, edit.files(adapter, rows))

    def remove(self, id: str) -> None:
        """Take one adapter out and delete its files, unless another record has the same.

        Raises:
            UnknownName: no such adapter.
        """
        edit.remove(self._disk, id)

    def rename(self, old: str, new: str) -> Record:
        """Give an adapter another id, also where others name it as a parent.

        Raises:
            UnknownName: no such adapter.
            PoolError: the new id is taken, or is none.
        """
        return edit.rename(self._disk, old, new)

    def tag(self, id: str, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Record:
        """Add tags to an adapter and remove others; those that are (not) there already are no error.

        Raises:
            UnknownName: no such adapter.
            PoolError: not a tag.
        """
        return edit.tag(self._disk, id, tuple(add), tuple(remove))

    def migrate(self) -> int:
        """Write the manifest in the current schema, which every other change does too; returns the schema it had."""
        return edit.migrate(self._disk)

    def copy_to(self, other: AdapterPool, ids: Iterable[str] | None = None) -> tuple[Record, ...]:
        """Copy adapters into another pool of the same backbone: all of them, or none where one cannot be.

        Where the other pool then has just the adapters of this one, and no predictor of its own, it gets that of
        this one too (with thresholds; see :meth:`AdapterModel.from_pool`): a whole copy predicts alike. A pool that has
        other adapters or a rule keeps predicting as it did.

        Args:
            other: takes them under the same ids; what it has already, exactly so, is left out.
            ids: default all.

        Returns:
            The records that were added there.

        Raises:
            IncompatibleBackbone: the other pool belongs to another backbone.
            UnknownName: no such adapter.
            PoolError: an id is taken there by another adapter, or a file is damaged.
        """
        return transfer.copy(self._disk, other._disk, self.ids if ids is None else tuple(ids))

    def export_to(self, folder: str | Path, id: str) -> Path:
        """Write one adapter as a new folder of its own: record.json and its files.

        The pool's predictor does not go along, nor does :meth:`import_from` take one: it is that of all adapters
        together.

        Raises:
            UnknownName: no such adapter.
            StorageError: the folder exists, or a file is damaged.
        """
        return transfer.export(self._disk, Path(folder), id)

    def import_from(self, folder: str | Path, *, id: str | None = None) -> Record:
        """Add an adapter from a folder of :meth:`export_to`.

        Args:
            folder: nothing in it is trusted: everything is checked first. (Shapes wait until the backbone is given to
                :meth:`open`, where that is a wrapped module.)
            id: another id than the folder's.

        Raises:
            IncompatibleBackbone: it belongs to another backbone.
            PoolError: damaged, not finite, not an adapter of this backbone, or its id is taken.
        """
        return transfer.import_folder(self._disk, Path(folder), id, self._loadable)

    def locked(self) -> AbstractContextManager[None]:
        """Keep all other writers out for a ``with`` block; this thread may change the pool in it, by this object.

        Raises:
            PoolError: another writer took longer than the timeout, or the pool cannot be written.
        """
        return self._disk.locked()

    def gc(self) -> tuple[str, ...]:
        """Delete the files that no record names; returns their paths below the pool.

        Raises:
            PoolError: a record is broken: its files cannot be told from orphans. Repair or remove it first.
        """
        with self._disk.locked():
            manifest = self._disk.manifest()
            if manifest.broken:
                raise PoolError(
                    f"the record of {shown(manifest.broken[0].id)} is broken, so its files could be taken for orphans: "
                    "repair or remove it first"
                )
            found = orphans(self.path, manifest.files)
            for name in found:
                delete(self.path, name)
        return found

    def verify(self) -> Verification:
        """Check the manifest, every file's SHA-256 and form, model.json, and shapes where the backbone is at hand.

        An index in the pool's folder that holds keys which the pool does not have (any more) is a problem too.
        """
        while True:
            try:
                manifest = self._disk.manifest()
            except PoolError as error:
                return Verification(False, (str(error),), ())
            found = verify_files(self.path, manifest, self._backbone)
            if found.ok or self._disk.manifest() == manifest:
                return found  # otherwise a writer was at work meanwhile

    def _addition(self, new: NewAdapter) -> edit.Addition:
        return edit.addition(new, lambda: self.backbone, self.backbone_card)

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
