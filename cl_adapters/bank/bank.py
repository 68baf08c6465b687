"""AdapterBank: T adapters ("slots") on a backbone, and the route that says which sample uses which."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.exclusive import exclusive
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.routes import BARE, Route, Routes, each_route
from cl_adapters.bank.site_adapters import ActiveRoutes, SiteAdapters, Watch
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone
from cl_adapters.sites.sites import Site

__all__ = ["BARE", "AdapterBank", "Route", "Routes"]

Loader = Callable[[int], Mapping[str, Tensor]]
"""Tensors of the n-th lazy slot, keyed as by :meth:`AdapterBank.export`; none: it adds nothing."""


@dataclass
class _LazySlots:
    """Slots whose tensors are loaded when they are used, at most ``limit`` of them at a time, newest use last."""

    slots: range
    loader: Loader
    limit: int
    loaded: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def __deepcopy__(self, memo: dict[int, object]) -> _LazySlots:
        return _LazySlots(self.slots, self.loader, self.limit, self.loaded.copy())  # what loads is no part of the copy


class AdapterBank(nn.Module):
    """T adapters at the sites of a backbone.

    A slot is one adapter: its tensors at all sites, or at those of some blocks only; elsewhere it adds nothing.

    Args:
        backbone: its encoder gets this bank's hooks; without an active route they change nothing.
        adapter: the adapter type with its hyper-parameters.
        blocks: indices of the blocks that get adapters; default all.

    Raises:
        IncompatibleBackbone: the backbone has no sites of the kind that the type needs.
    """

    def __init__(self, backbone: FrozenBackbone, adapter: AdapterType, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        sites = sites_of(backbone, adapter, blocks)
        self.adapter = adapter
        self.sites = sites
        self._num_slots = 0
        self._lazy: _LazySlots | None = None
        self._active = ActiveRoutes(backbone)
        self.at = nn.ModuleList(SiteAdapters(site, adapter.at(site), self._active) for site in sites)
        for place in self._places():
            place.attach(backbone.encoder)
        self._anchor = [backbone.encoder]  # in a list: not a submodule, only a pointer to the device in use

    @property
    def num_slots(self) -> int:
        """T, adapters so far, loaded or not."""
        return self._num_slots

    @property
    def loaded(self) -> tuple[int, ...]:
        """The slots that are in memory; all of them, but for those of :meth:`load_on_use`."""
        lazy = self._lazy
        return tuple(
            slot for slot in range(self.num_slots) if lazy is None or slot not in lazy.slots or slot in lazy.loaded
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have sites, in order."""
        return tuple(sorted({site.block for site in self.sites}))

    def add_slot(self, tensors: Mapping[str, Tensor]) -> int:
        """Append one adapter and return its slot number.

        Its tensors, as from :meth:`export` or :meth:`fresh`, are copied; they may be for some of the sites only.

        Raises:
            ClAdaptersError: names or shapes that are not this bank's.
        """
        self._put(self._num_slots, tensors)
        self._num_slots += 1
        return self._num_slots - 1

    def load_on_use(self, slots: int, loader: Loader, limit: int = 64) -> None:
        """Append adapters, frozen, that are loaded when a route names them (or when they are exported).

        Args:
            slots: how many.
            loader: gives the tensors of the n-th of them; called again when they were dropped meanwhile.
            limit: adapters kept in memory. The least recently used go first; a batch over more than that is still
                served, and the rest dropped with the next one.

        Raises:
            ClAdaptersError: the bank has such slots already, or a limit below 1.
        """
        if self._lazy is not None or limit < 1:
            raise ClAdaptersError("a bank loads one set of adapters on use, with a limit of at least 1")
        self._lazy = _LazySlots(range(self._num_slots, self._num_slots + slots), loader, limit)
        self._num_slots += slots

    def fresh(self, generator: torch.Generator, blocks: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Newly initialised tensors for one adapter, keyed "site/name"; ``blocks``: only there."""
        return {
            f"{place.site.name}/{name}": value
            for place in self._places()
            if blocks is None or place.site.block in blocks
            for name, value in place.adapter.init(place.site, generator).items()
        }

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copies of one adapter's tensors, keyed "blocks.3.ffn/down": no adapter name in the keys."""
        return {key: value.detach().clone() for key, value in self.named_slot(slot)}

    def named_slot(self, slot: int) -> Iterator[tuple[str, nn.Parameter]]:
        """The live parameters of one slot with their keys, sites in order."""
        with exclusive(self._anchor[0]):  # another thread's pass might drop it meanwhile
            self._bring([slot])
            found = [
                (f"{place.site.name}/{name}", value)
                for place in self._places()
                if place.has(slot)
                for name, value in place.slots[str(slot)].named_parameters()
            ]
        yield from found

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """The live parameters of one slot."""
        return [value for _, value in self.named_slot(slot)]

    def freeze(self, slot: int) -> None:
        """Take one slot out of training."""
        for parameter in self.slot_parameters(slot):
            parameter.requires_grad_(False)
            parameter.grad = None

    @contextmanager
    def route(
        self, routes: Routes | None, dropout_generator: torch.Generator | None = None, watch: Watch | None = None
    ) -> Iterator[None]:
        """Use these adapters in the forward passes of the ``with`` block; other threads' passes wait until it ends.

        Args:
            routes: one route for all sites, or one per site name; None for the bare backbone.
            dropout_generator: generator of dropout masks (training).
            watch: called with the input of every site that has a route.

        Raises:
            ClAdaptersError: a slot or site that does not exist.
        """
        self._check(routes)
        with exclusive(self._anchor[0]):
            self._bring([slot for route in each_route(routes) for slot in route.slots])
            active = self._active
            before = (active.routes, active.dropout_generator, active.watch)
            active.routes, active.dropout_generator, active.watch = routes, dropout_generator, watch
            try:
                yield
            except BaseException:
                for place in self._places():
                    place.end_pass(self._anchor[0])
                raise
            finally:
                active.routes, active.dropout_generator, active.watch = before

    def _check(self, routes: Routes | None) -> None:
        if isinstance(routes, Mapping):
            names = [site.name for site in self.sites]
            absent = sorted(set(routes) - set(names))
            if absent:
                raise ClAdaptersError(f"no site {absent[0]!r}; the bank has {', '.join(names)}")
        for route in each_route(routes):
            wrong = [slot for slot in route.slots if not BARE <= slot < self.num_slots]
            if wrong:
                known = f"slots 0..{self.num_slots - 1}" if self.num_slots else "no slot yet"
                raise ClAdaptersError(f"the route names slot {wrong[0]}, but the bank has {known}")

    def _put(self, slot: int, tensors: Mapping[str, Tensor], *, trainable: bool = True) -> None:
        """Make tensors the parameters of a slot."""
        named = {key.rpartition("/")[0] for key in tensors}
        expected = self._expected(named) if named & {site.name for site in self.sites} else self._expected()
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        if found != expected:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            key = wrong[0]
            raise ClAdaptersError(
                f"adapter tensors do not fit this bank at {len(wrong)} places; first {key!r}: "
                f"expected {expected.get(key)}, got {found.get(key)}"
            )
        reference = next(self._anchor[0].parameters())
        # never less than float32, also where the backbone's weights are of half precision or quantised
        like: Any = {"device": reference.device, "dtype": torch.promote_types(reference.dtype, torch.float32)}
        for place in self._places():
            if place.site.name in named:
                fitting = {
                    name: nn.Parameter(tensors[f"{place.site.name}/{name}"].detach().clone().to(**like), trainable)
                    for name in place.adapter.shapes(place.site)
                }
                place.slots[str(slot)] = nn.ParameterDict(fitting)

    def _bring(self, slots: Iterable[int]) -> None:
        """Load the lazy slots among these; drop what was not used for longest."""
        lazy = self._lazy
        if lazy is None:
            return
        wanted = [slot for slot in dict.fromkeys(slots) if slot in lazy.slots]
        for slot in wanted:
            if slot not in lazy.loaded:
                tensors = lazy.loader(slot - lazy.slots.start)
                with torch.inference_mode(False):  # parameters that can be trained, and whose changes are noticed
                    if tensors:
                        self._put(slot, tensors, trainable=False)
                lazy.loaded[slot] = None
            lazy.loaded.move_to_end(slot)
        for slot in list(lazy.loaded)[: -max(lazy.limit, len(wanted))]:
            del lazy.loaded[slot]
            for place in self._places():
                place.drop(slot)

    def _places(self) -> list[SiteAdapters]:
        return [place for place in self.at if isinstance(place, SiteAdapters)]

    def _expected(self, at: set[str] | None = None) -> dict[str, tuple[int, ...]]:
        return {
            f"{site.name}/{name}": tuple(shape)
            for site in self.sites
            if at is None or site.name in at
            for name, shape in self.adapter.shapes(site).items()
        }


def sites_of(backbone: FrozenBackbone, adapter: AdapterType, blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
    """Where adapters of this type attach, from the first block to the last.

    Raises:
        IncompatibleBackbone: the backbone has no such sites, or not in the layout that the type needs.
        ClAdaptersError: blocks that do not exist.
    """
    found = [site for kind in adapter.site_kinds for site in backbone.sites(kind)]
    sites = tuple(sorted(found, key=lambda site: site.block))  # stable: kinds stay in the type's order
    if any(adapter.at(site).layout == "map" and site.layout == "tokens" for site in sites):
        raise IncompatibleBackbone(
            f"{type(adapter).__name__} needs feature maps, but the tokens of {backbone.name!r} lie in a row"
        )
    if blocks is None:
        return sites
    if not blocks:
        raise ClAdaptersError("adapters need at least one block; leave blocks out for all")
    known = {site.block for site in sites}
    absent = sorted(set(blocks) - known)
    if absent:
        raise ClAdaptersError(f"blocks {absent} do not exist; the backbone has {min(known)}..{max(known)}")
    return tuple(site for site in sites if site.block in set(blocks))
