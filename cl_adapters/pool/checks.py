"""What a record's tensors have to be: those of its adapter type at the backbone's sites, and rows for its classes.

C classes of the record, D width of the backbone's features, M keys, H held-out features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cl_adapters._forms import shown
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone, PoolError
from cl_adapters.pool.header import Header
from cl_adapters.pool.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.adapters.base import AdapterType
    from cl_adapters.backbones.frozen import FrozenBackbone

FLOATS = ("F32", "F16", "BF16")
KNOWLEDGE: dict[str, tuple[str, tuple[str, ...]]] = {
    "keys": ("F32", ("M", "D")),
    "key_class": ("I64", ("M",)),
    "key_size": ("I64", ("M",)),
    "head.weight": ("F32", ("C", "D")),
    "head.bias": ("F32", ("C",)),
    "prototypes": ("F32", ("C", "D")),
    "held_out": ("F32", ("H", "D")),
    "held_out_class": ("I64", ("H",)),
}
"""Names, types and shapes of what a knowledge file may hold: a closed list, so that forgetting a class is whole."""
PER_CLASS = ("head.weight", "head.bias", "prototypes")
"""Those with one row per class."""
PER_KEY = {"key_class": ("keys", "key_size"), "held_out_class": ("held_out",)}
"""The class of each row of those with any number of rows per class. ``key_size`` may be missing: how many features a
centroid is the mean of."""
TOGETHER = (("keys", "key_class"), ("head.weight", "head.bias"), ("held_out", "held_out_class"))


def adapter_of(record: Record) -> AdapterType | None:
    """The adapter type that a record names, with its options.

    Raises:
        PoolError: this installation does not know the type or its options.
    """
    if record.adapter is None:
        return None
    from cl_adapters.adapters.base import adapter_from

    try:
        return adapter_from(record.adapter)
    except (ClAdaptersError, TypeError) as error:
        raise PoolError(
            f"adapter {record.id!r} cannot be used: {error}; install what it was made with, or remove it"
        ) from error


def site_shapes(backbone: FrozenBackbone, adapter: AdapterType) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the tensors at every site where the type attaches: {site: {key: shape}}."""
    from cl_adapters.bank.bank import sites_of

    return {
        site.name: {f"{site.name}/{name}": tuple(shape) for name, shape in adapter.shapes(site).items()}
        for site in sites_of(backbone, adapter)
    }


def blocks_of(header: Header, backbone: FrozenBackbone, adapter: AdapterType) -> tuple[int, ...]:
    """The blocks that these tensors are for."""
    from cl_adapters.bank.bank import sites_of

    named = {key.rpartition("/")[0] for key in header}
    return tuple(sorted({site.block for site in sites_of(backbone, adapter) if site.name in named}))


def check_adapter(header: Header, backbone: FrozenBackbone, adapter: AdapterType, where: str) -> None:
    """Check that tensors are those of an adapter type at all of the backbone's sites, or at some.

    Raises:
        PoolError: other names, shapes or types of numbers.
    """
    sites = site_shapes(backbone, adapter)
    named = {key.rpartition("/")[0] for key in header}
    expected = {key: shape for site, shapes in sites.items() if site in named for key, shape in shapes.items()}
    found = {key: declared.shape for key, declared in header.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong or not found:
        key = wrong[0] if wrong else next(iter(next(iter(sites.values()))))
        raise PoolError(
            f"{where} has not the tensors of {adapter!r} on backbone {backbone.name!r}; first {shown(key)}: expected "
            f"{expected.get(key, 'none')}, got {found.get(key, 'none')}"
        )
    check_floats(header, where)


def check_floats(header: Header, where: str) -> None:
    """Check that the tensors are float32, or half precision that float32 holds exactly.

    Raises:
        PoolError: one is not.
    """
    for key, declared in header.items():
        if declared.dtype not in FLOATS:
            raise PoolError(f"{where}: tensor {shown(key)} is {declared.dtype}; float32 is expected")


def check_knowledge(header: Header, num_classes: int, card: BackboneCard, where: str) -> None:
    """Check names, types and shapes of a record's prototypes and other rows.

    Raises:
        PoolError: they are not those of :data:`KNOWLEDGE`.
    """
    sizes = {"C": num_classes, "D": card.num_features}
    for key, (dtype, shape) in header.items():
        if key not in KNOWLEDGE:
            raise PoolError(f"{where}: unknown tensor {shown(key)}; known: {', '.join(KNOWLEDGE)}")
        wanted, letters = KNOWLEDGE[key]
        expected = tuple(sizes.get(letter, -1) for letter in letters)
        if len(shape) == len(letters) and expected[0] < 0:
            expected = (sizes.setdefault(letters[0], shape[0]), *expected[1:])
        if dtype != wanted or shape != expected:
            raise PoolError(
                f"{where}: {key} has to be {wanted} [{', '.join(letters)}] = {list(expected)} for its "
                f"{num_classes} classes and D = {card.num_features}; got {dtype} {list(shape)}"
            )
    if "key_size" in header and "keys" not in header:
        raise PoolError(f"{where}: key_size goes with keys")
    for one, other in TOGETHER:
        if (one in header) != (other in header):
            raise PoolError(f"{where}: {one} and {other} go together")


def check_positions(knowledge: Mapping[str, Tensor], num_classes: int, where: str) -> None:
    """Check that the keys' classes are positions in the record's classes, and that no key stands for nothing.

    Raises:
        PoolError: one is not, or does.
    """
    sizes = knowledge.get("key_size")
    if sizes is not None and sizes.numel() and int(sizes.min()) < 1:
        raise PoolError(f"{where}: key_size has {int(sizes.min())}, but a key is the mean of at least 1 feature")
    for key in ("key_class", "held_out_class"):
        rows = knowledge.get(key)
        if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num_classes:
            raise PoolError(
                f"{where}: {key} has values {int(rows.min())}..{int(rows.max())}, but positions in its {num_classes} "
                "classes are expected"
            )


def adapter_check(record: Record, header: Header, backbone: FrozenBackbone | None, *, decoded: bool = False) -> None:
    """Check what the file of an adapter declares, as far as that is known without and with a backbone.

    ``decoded``: these are the tensors after decompression; of a compressed file only those can be checked.

    Raises:
        PoolError: it is not what its record says.
    """
    where = f"adapter {record.id!r}"
    adapter = adapter_of(record)
    if record.compression is not None and not decoded:
        return
    check_floats(header, where)
    if count(header) != record.num_parameters:
        raise PoolError(f"{where} has {count(header)} numbers, but its record says {record.num_parameters}")
    if backbone is not None and adapter is not None:
        check_adapter(header, backbone, adapter, where)
        blocks = blocks_of(header, backbone, adapter)
        if blocks != record.blocks:
            raise PoolError(f"{where} has tensors for blocks {blocks}, but its record says {record.blocks}")


def count(header: Header) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(declared.shape) for declared in header.values())


def load_backbone(card: BackboneCard) -> FrozenBackbone:
    """Load the backbone of a pool from its recorded source.

    Raises:
        IncompatibleBackbone: it was a wrapped module; or what the source gives today is another one.
        BackboneUnavailable: its weights cannot be had here.
        PoolError: the source is none.
    """
    if not card.source:
        raise IncompatibleBackbone(
            f"this pool belongs to a wrapped module ({card.name}), which cannot be loaded by name: open it with "
            "backbone=FrozenBackbone.wrap(module, ...)"
        )
    backbone = card.opened("the pool's manifest", PoolError)
    card.check(backbone, "what its source gives,")
    return backbone
