"""Record: what the pool's manifest knows of one adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cl_adapters._forms import SHA, Count, Label, check_label, check_text, clipped, shown
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError, PoolError

ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TAG = re.compile(r"[^\s,][^,]{0,63}")


@dataclass(frozen=True, kw_only=True)
class PoolClass:
    """One class that an adapter was trained on.

    Attributes:
        label: its number in the benchmark, 64-bit.
        name: its name; None where the benchmark has none.
    """

    label: Label
    name: str | None = None

    def __post_init__(self) -> None:
        check_label(self.label, PoolError)
        if self.name is not None:
            check_text("class name", self.name, PoolError)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One adapter of a pool. Everything is checked when a record is made, so no other code needs to.

    Attributes:
        id: lower-case letters, digits, ".", "_" and "-", at most 64; never used as a path.
        adapter: adapter type with its options, {"type": ..., ...}; None: the bare backbone answers.
        blocks: indices of the backbone's blocks that the adapter has tensors for.
        classes: what it was trained on; row i of the knowledge belongs to class i.
        task: number of the task it was made for.
        adapter_sha: SHA-256 of its tensors' file; None exactly where ``adapter`` is.
        knowledge_sha: SHA-256 of the file of prototypes and other rows; None: there is none.
        num_parameters: numbers in the adapter, before compression.
        tags: free words to select by; none contains a comma.
        parents: ids of the adapters that it was merged from, or otherwise made of; those of another pool with the
            beginning of their SHA-256, "task-000.0123456789ab".
        merge: merge method with its options, and what it reported; None where nothing was merged.
        compression: name of the codec of the stored tensors; None: float32 as trained.
        benchmark: where the training data came from.
        metrics: measured when it was added, such as {"accuracy": 97.2}.
        created: ISO time, UTC.
        library_version: cl-adapters that wrote it.

    Raises:
        PoolError: a value of the wrong form.
    """

    id: str
    adapter: dict[str, Any] | None
    blocks: tuple[Count, ...]
    classes: tuple[PoolClass, ...]
    task: int | None
    adapter_sha: str | None
    knowledge_sha: str | None
    num_parameters: int
    tags: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    merge: dict[str, Any] | None = None
    compression: str | None = None
    benchmark: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    created: str
    library_version: str

    def __post_init__(self) -> None:
        check_id(self.id)
        for parent in self.parents:
            check_id(parent)
        for sha in (self.adapter_sha, self.knowledge_sha):
            if sha is not None and not SHA.fullmatch(sha):
                raise PoolError(f"{shown(sha)} is no SHA-256: 64 hexadecimal digits in lower case are expected")
        if (self.adapter is None) != (self.adapter_sha is None):
            raise PoolError("a record has both adapter and adapter_sha, or neither")
        if self.adapter is not None and not isinstance(self.adapter.get("type"), str):
            raise PoolError(f'adapter names its type, such as {{"type": "bottleneck"}}; got {shown(self.adapter)}')
        if self.adapter is None and (self.compression is not None or self.num_parameters or self.blocks):
            raise PoolError("a record without an adapter has no blocks, parameters or compression")
        if not all(0 <= number < 2**63 for number in (self.num_parameters, self.task or 0, *self.blocks)):
            raise PoolError("num_parameters, task and blocks cannot be negative, or longer than 64 bits")
        _check_unique("class label", [str(known.label) for known in self.classes])
        _check_unique("tag", self.tags)
        for tag in self.tags:
            check_tag(tag)
        for key, value in self.metrics.items():
            check_text("metric", key, PoolError)
            if not math.isfinite(value):
                raise PoolError(f"metric {key!r} is {value}; leave out what is not a finite number")
        _check_json("adapter", self.adapter)
        _check_json("merge", self.merge)
        for what in ("compression", "benchmark", "created", "library_version"):
            text = getattr(self, what)
            if text is not None:
                check_text(what, text, PoolError)

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes' numbers, in the order of the knowledge's rows."""
        return tuple(known.label for known in self.classes)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of its files below the pool, such as "adapters/<sha256>.safetensors"."""
        stored = ((adapter_file, self.adapter_sha), (knowledge_file, self.knowledge_sha))
        return tuple(place(sha) for place, sha in stored if sha is not None)


def adapter_file(sha: str) -> str:
    """Path of an adapter's tensors below the pool."""
    return f"adapters/{sha}.safetensors"


def knowledge_file(sha: str) -> str:
    """Path of a record's prototypes and other rows below the pool."""
    return f"knowledge/{sha}.safetensors"


def record_from_plain(plain: Any) -> Record:
    """The record that :func:`record_to_plain` gave, every value checked.

    Raises:
        PoolError: an unknown, missing or ill-formed value.
    """
    if not isinstance(plain, dict):
        raise PoolError(f"a record is a JSON object, got {shown(plain)}")
    try:
        return build(Record, plain, "record")
    except ConfigError as error:
        raise PoolError(clipped(str(error), 300)) from error


def record_to_plain(record: Record) -> dict[str, Any]:
    """The record as JSON-ready values."""
    return to_plain(record)


def check_id(id: str) -> None:
    """Check the form of an id.

    Raises:
        PoolError: it is not lower-case letters, digits, ".", "_" and "-".
    """
    if not isinstance(id, str) or not ID.fullmatch(id):
        raise PoolError(
            f"{shown(id)} cannot be an adapter's id: up to 64 of a-z, 0-9, '.', '_' and '-' are, such as 'task-000'"
        )


def check_tag(tag: str) -> None:
    """Check the form of a tag.

    Raises:
        PoolError: it is empty, too long, or has a comma or control character.
    """
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise PoolError(f"{shown(tag)} cannot be a tag: 1 to 64 characters without commas, not starting with a space")
    check_text("tag", tag, PoolError)


def _check_unique(what: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise PoolError(f"{what} {shown(value)} is there twice")
        seen.add(value)


def _check_json(what: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PoolError(f"{what} has to be plain JSON: {error}") from error
