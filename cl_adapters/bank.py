"""AdapterBank: T adapters per site, and the route that says which sample uses which.

The bank hangs on the backbone by hooks that are bound methods of its modules. A closure would keep the
original's weights after a deepcopy; a bound method is copied along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone
from cl_adapters.sites import Site

BARE = -1
"""Slot number that stands for the backbone without any adapter."""


@dataclass(frozen=True)
class Route:
    """Who uses which adapter in one forward pass.

    Attributes:
        slots: the distinct slots in use, U of them.
        index_B: int64 [B], position in ``slots`` per sample; None when one slot serves all.
        weights_BU: float [B, U], soft mixture of the slots' outputs; None when the choice is hard.
    """

    slots: tuple[int, ...]
    index_B: Tensor | None = None
    weights_BU: Tensor | None = None

    @classmethod
    def single(cls, slot: int) -> Route:
        """The same slot for every sample."""
        return cls((slot,))

    @classmethod
    def hard(cls, ids_B: Tensor) -> Route:
        """One slot per sample, int64 [B]."""
        slots, index_B = torch.unique(ids_B, return_inverse=True)
        return cls(tuple(slots.tolist()), None if len(slots) == 1 else index_B)

    @classmethod
    def soft(cls, weights_BT: Tensor) -> Route:
        """A weighted sum of all slots' outputs per sample, float [B, T]; slots of weight 0 everywhere are skipped."""
        slots = (weights_BT != 0).any(0).nonzero().flatten()
        return cls(tuple(slots.tolist()), weights_BU=weights_BT[:, slots])


Routes: TypeAlias = Route | Mapping[str, Route]


@dataclass
class _Active:
    """The route of the forward pass in progress, shared by all sites of one bank."""

    routes: Routes | None = None
    noise: torch.Generator | None = None

    def at(self, site: str) -> Route | None:
        if self.routes is None or isinstance(self.routes, Route):
            return self.routes
        return self.routes.get(site)


class SiteAdapters(nn.Module):
    """The adapters at one site, and the two hooks that connect them."""

    def __init__(self, site: Site, adapter: AdapterType, active: _Active) -> None:
        super().__init__()
        self.site = site
        self.adapter = adapter
        self.slots = nn.ModuleList()
        self._active = active
        self._source: Tensor | None = None

    def attach(self, encoder: nn.Module) -> None:
        """Register the hooks on the encoder.

        Raises:
            IncompatibleBackbone: the site names a module that the encoder does not have.
        """
        source, target = self.site.source, self.site.target
        try:
            reads, adds = encoder.get_submodule(source.module), encoder.get_submodule(target.module)
        except AttributeError as error:
            raise IncompatibleBackbone(
                f"site {self.site.name!r} reads {source.module!r} and adds to {target.module!r}, but {error}"
            ) from error
        if source.end == "in":
            reads.register_forward_pre_hook(self.read_input)
        elif source != target:
            reads.register_forward_hook(self.read_output)
        adds.register_forward_hook(self.add_delta)

    def read_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward-pre-hook: keep the input until the target is reached."""
        if self._active.routes is not None:
            self._source = args[0]

    def read_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook: keep the output until the target is reached."""
        if self._active.routes is not None:
            self._source = output

    def add_delta(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: add the routed adapters' output."""
        route = self._active.at(self.site.name)
        source, self._source = self._source, None
        if route is None or not route.slots or route.slots == (BARE,):
            return None
        return output + self.delta(output if source is None else source, route)

    def delta(self, x_BND: Tensor, route: Route) -> Tensor:
        """Routed output [B, N, D] for input [B, N, D]."""
        noise = self._active.noise
        choices = route.index_B if route.weights_BU is None else route.weights_BU
        if choices is not None and len(choices) != len(x_BND):
            raise ClAdaptersError(f"the route has {len(choices)} samples, the batch has {len(x_BND)}")
        if route.weights_BU is not None:
            outputs = [self.adapter.apply(x_BND, self.params(slot), noise) for slot in route.slots]
            shares = route.weights_BU.unbind(1)
            return torch.stack([o * w[:, None, None] for o, w in zip(outputs, shares, strict=True)]).sum(0)
        if route.index_B is None:
            return self.adapter.apply(x_BND, self.params(route.slots[0]), noise)
        if BARE in route.slots:
            return self._delta_of_some(x_BND, route.slots, route.index_B)
        used = [self.params(slot) for slot in route.slots]
        gathered = {name: torch.stack([p[name] for p in used]).index_select(0, route.index_B) for name in used[0]}
        return self.adapter.apply(x_BND, gathered, noise)

    def _delta_of_some(self, x_BND: Tensor, slots: tuple[int, ...], index_B: Tensor) -> Tensor:
        """Zeros for the samples that take no adapter."""
        bare = slots.index(BARE)
        rows = (index_B != bare).nonzero().flatten()
        others = index_B[rows]
        route = Route(slots[:bare] + slots[bare + 1 :], others - (others > bare).long())
        return torch.zeros_like(x_BND).index_copy(0, rows, self.delta(x_BND[rows], route))

    def params(self, slot: int) -> dict[str, Tensor]:
        """The tensors of one slot."""
        return dict(self.slots[slot].named_parameters())


class AdapterBank(nn.Module):
    """T adapters ("slots") at every site of a backbone.

    Args:
        backbone: its encoder gets this bank's hooks; without an active route they change nothing.
        adapter: the adapter type with its hyper-parameters.
        blocks: indices of the blocks that get adapters; default all.

    Raises:
        IncompatibleBackbone: the backbone has no sites of the kind that the type needs.
    """

    def __init__(self, backbone: FrozenBackbone, adapter: AdapterType, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        sites = backbone.sites(adapter.site_kind)
        if blocks is not None:
            if not blocks:
                raise ClAdaptersError("adapters need at least one block; leave blocks out for all")
            absent = sorted(set(blocks) - {site.block for site in sites})
            if absent:
                raise ClAdaptersError(f"blocks {absent} do not exist; the backbone has 0..{len(sites) - 1}")
            sites = tuple(site for site in sites if site.block in set(blocks))
        self.adapter = adapter
        self.sites = sites
        self._active = _Active()
        self.at = nn.ModuleList(SiteAdapters(site, adapter, self._active) for site in sites)
        for place in self._places():
            place.attach(backbone.encoder)
        self._anchor = [backbone.encoder]  # in a list: not a submodule, only a pointer to the device in use

    @property
    def num_slots(self) -> int:
        """T, adapters per site."""
        return len(self._places()[0].slots)

    def add_slot(self, tensors: Mapping[str, Tensor]) -> int:
        """Append one adapter (all sites at once) and return its slot number.

        Args:
            tensors: as from :meth:`export` or :meth:`fresh`; copied.

        Raises:
            ClAdaptersError: names or shapes that are not this bank's.
        """
        expected = self._expected()
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        if found != expected:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            key = wrong[0]
            raise ClAdaptersError(
                f"adapter tensors do not fit this bank at {len(wrong)} places; first {key!r}: "
                f"expected {expected.get(key)}, got {found.get(key)}"
            )
        reference = next(self._anchor[0].parameters())
        for place in self._places():
            names = place.adapter.shapes(place.site.width)
            slot = nn.ParameterDict(
                {
                    name: nn.Parameter(tensors[f"{place.site.name}/{name}"].detach().clone().to(reference))
                    for name in names
                }
            )
            place.slots.append(slot)
        return self.num_slots - 1

    def fresh(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Newly initialised tensors for one adapter, keyed "site/name"."""
        return {
            f"{place.site.name}/{name}": value
            for place in self._places()
            for name, value in place.adapter.init(place.site.width, generator).items()
        }

    def export(self, slot: int) -> dict[str, Tensor]:
        """Copies of one adapter's tensors, keyed "blocks.3.ffn/down": no adapter name in the keys."""
        return {key: value.detach().clone() for key, value in self.named_slot(slot)}

    def named_slot(self, slot: int) -> Iterator[tuple[str, nn.Parameter]]:
        """The live parameters of one slot with their keys, sites in order."""
        for place in self._places():
            for name, value in place.slots[slot].named_parameters():
                yield f"{place.site.name}/{name}", value

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """The live parameters of one slot."""
        return [value for _, value in self.named_slot(slot)]

    def freeze(self, slot: int) -> None:
        """Take one slot out of training."""
        for parameter in self.slot_parameters(slot):
            parameter.requires_grad_(False)
            parameter.grad = None

    @contextmanager
    def route(self, routes: Routes | None, noise: torch.Generator | None = None) -> Iterator[None]:
        """Use these adapters in the forward passes of the ``with`` block.

        Args:
            routes: one route for all sites, or one per site name; None for the bare backbone.
            noise: generator of dropout masks (training).

        Raises:
            ClAdaptersError: a slot or site that does not exist.
        """
        self._check(routes)
        before = (self._active.routes, self._active.noise)
        self._active.routes, self._active.noise = routes, noise
        try:
            yield
        finally:
            self._active.routes, self._active.noise = before

    def _check(self, routes: Routes | None) -> None:
        if isinstance(routes, Mapping):
            names = [site.name for site in self.sites]
            absent = sorted(set(routes) - set(names))
            if absent:
                raise ClAdaptersError(f"no site {absent[0]!r}; the bank has {', '.join(names)}")
        for route in routes.values() if isinstance(routes, Mapping) else [routes] if routes is not None else []:
            wrong = [slot for slot in route.slots if not BARE <= slot < self.num_slots]
            if wrong:
                known = f"slots 0..{self.num_slots - 1}" if self.num_slots else "no slot yet"
                raise ClAdaptersError(f"the route names slot {wrong[0]}, but the bank has {known}")

    def _places(self) -> list[SiteAdapters]:
        return [place for place in self.at if isinstance(place, SiteAdapters)]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{place.site.name}/{name}": tuple(shape)
            for place in self._places()
            for name, shape in place.adapter.shapes(place.site.width).items()
        }
