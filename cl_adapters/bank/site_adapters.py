"""SiteAdapters: the adapters at one site, and the hooks that connect them with the backbone.

The hooks name their module weakly: an encoder does not keep the adapters of a model that is gone. They are copied along
with encoder and adapters by a deepcopy, where a closure would keep the original's weights.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.hf_forward import upcast
from cl_adapters.bank.routes import Route, Routes
from cl_adapters.bank.slot_stacks import SlotStack
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone
from cl_adapters.sites import attention as attention_sites
from cl_adapters.sites.sites import Site

Watch = Callable[[str, Tensor], None]
"""Told the name of a site and the input x_BND that its adapters see (detach it before you keep it).

Of texts only the mean over the tokens of each, [B, 1, D]: so nothing depends on how far a batch is padded.
"""


@dataclass
class ActiveRoutes:
    """The route of the forward pass in progress, shared by all sites of one bank.

    Attributes:
        backbone: in whose passes it is used.
    """

    backbone: nn.Module
    routes: Routes | None = None
    dropout_generator: torch.Generator | None = None
    watch: Watch | None = None

    @property
    def mask_BN(self) -> Tensor | None:
        """Which places of the pass in progress hold tokens, bool [B, N]; None: all."""
        mask_BN: Tensor | None = getattr(self.backbone, "token_mask", None)
        return mask_BN

    def at(self, site: str) -> Route | None:
        """The route at one site; None: bare."""
        if self.routes is None or isinstance(self.routes, Route):
            return self.routes
        return self.routes.get(site)


@dataclass(frozen=True)
class _WeakHook:
    """A hook that calls a method of an object while it is there, and is copied along with it."""

    owner: weakref.ref[SiteAdapters]
    method: str

    def __call__(self, *args: Any) -> Any:
        owner = self.owner()
        return None if owner is None else getattr(owner, self.method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WeakHook:
        return replace(self, owner=weakref.ref(copy.deepcopy(owner, memo))) if (owner := self.owner()) else self


class SiteAdapters(nn.Module):
    """The adapters at one site.

    Activations of half precision reach them in float32: adapters are small, and their gradients need the digits.

    Attributes:
        slots: slot number (as text) to its tensors; a slot without adapter at this site adds nothing here.
    """

    def __init__(self, site: Site, adapter: AdapterType, active: ActiveRoutes) -> None:
        super().__init__()
        self.site = site
        self.adapter = adapter
        self.slots = nn.ModuleDict()
        self._active = active
        self._source: Tensor | None = None
        self._rows = (0, 0)  # B and N, where the site's tokens lie in one row
        self._stack = SlotStack()

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
        if self.site.rows is not None:
            self._hook(encoder.get_submodule(self.site.rows.module).register_forward_pre_hook, self.note_rows)
        if target.end == "inside":
            self._hook(adds.register_forward_pre_hook, self.enter_attention)
            self._hook(partial(adds.register_forward_hook, always_call=True), self.leave_attention)
            return
        if source != target and source.end == "in":
            self._hook(reads.register_forward_pre_hook, self.read_input)
        elif source != target:
            self._hook(reads.register_forward_hook, self.read_output)
        if target.end == "in":
            self._hook(adds.register_forward_pre_hook, self.add_to_input)
        else:
            self._hook(adds.register_forward_hook, self.add_to_output)

    def has(self, slot: int) -> bool:
        """Whether that slot has an adapter here."""
        return str(slot) in self.slots

    def params(self, slot: int) -> dict[str, Tensor]:
        """The tensors of one slot."""
        return dict(self.slots[str(slot)].named_parameters())

    def drop(self, slot: int) -> None:
        """Forget the tensors of one slot."""
        if self.has(slot):
            del self.slots[str(slot)]
            self._stack = SlotStack()

    def end_pass(self, encoder: nn.Module) -> None:
        """Be as before a pass that ended in the middle: torch calls no hook after Ctrl-C, not even those for errors."""
        self._source = None
        if self.site.target.end == "inside":
            attention_sites.leave(encoder.get_submodule(self.site.target.module))

    def _hook(self, register: Callable[[Any], RemovableHandle], method: Callable[..., Any]) -> None:
        """Register a method of this object as a hook for as long as it lives."""
        handle = register(_WeakHook(weakref.ref(self), method.__name__))
        weakref.finalize(self, handle.remove).atexit = False

    # --- hooks ---------------------------------------------------------------------------------------------------

    def note_rows(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward-pre-hook: note how many samples there are, and how many tokens each has."""
        self._rows = tuple(args[0].shape[:2])

    def read_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward-pre-hook: keep the input until the target is reached."""
        if self._active.routes is not None:
            self._source = args[0]

    def read_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook: keep the output until the target is reached."""
        if self._active.routes is not None:
            self._source = output

    def add_to_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward-pre-hook: add the routed adapters' output to the first input."""
        added = self._added(args[0])
        return None if added is None else (added, *args[1:])

    def add_to_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: add the routed adapters' output."""
        return self._added(output)

    def enter_attention(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward-pre-hook: let the routed adapters add inside this attention."""
        if self._active.at(self.site.name) is not None:
            attention_sites.enter(module, self.add_to_heads)

    def leave_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, run also after an error: the attention is as it was."""
        attention_sites.leave(module)

    def add_to_heads(self, heads_BNHd: Tensor, x_BND: Tensor) -> Tensor:
        """Add the routed adapters' output to what the heads of an attention put out."""
        route = self._active.at(self.site.name)
        assert route is not None
        delta = self._routed(upcast(x_BND), upcast(heads_BNHd.flatten(2)), route)
        return heads_BNHd if delta is None else heads_BNHd + delta.reshape(heads_BNHd.shape).to(heads_BNHd.dtype)

    def _added(self, y: Tensor) -> Tensor | None:
        route = self._active.at(self.site.name)
        source, self._source = self._source, None
        if route is None:
            return None
        if source is None and self.site.source != self.site.target:
            raise IncompatibleBackbone(
                f"site {self.site.name!r}: {self.site.target.module!r} ran before {self.site.source.module!r}, "
                "so its adapters have no input"
            )
        x = y if source is None else source
        delta = self._routed(upcast(self._inward(x)), upcast(self._inward(self._shaped(y, x))), route)
        if delta is None:
            return None
        delta = self._outward(delta, y).to(y.dtype)
        if self.site.qkv_part is not None:
            before = self.site.qkv_part * self.site.out_width
            delta = F.pad(delta, (before, y.shape[-1] - before - self.site.out_width))
        return y + delta

    # --- layouts -------------------------------------------------------------------------------------------------

    def _inward(self, x: Tensor) -> Tensor:
        """Activations of the site as the adapter type wants them."""
        if self.adapter.layout == "map":
            return x if self.site.layout == "map" else x.permute(0, 3, 1, 2)
        if self.site.layout == "map":
            return x.flatten(2).mT
        if self.site.rows is not None and x.ndim == 2:
            return x.reshape(*self._rows, -1)
        return x.flatten(1, -2) if x.ndim > 3 else x

    def _shaped(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` with its tokens as in ``x``: Swin flattens its grid before the feed-forward network."""
        return y if self.site.layout == "map" else y.reshape(*x.shape[:-1], y.shape[-1])

    def _outward(self, delta: Tensor, y: Tensor) -> Tensor:
        """The adapter's output in the layout of ``y``, to which it is added."""
        if self.site.layout == "map":
            return delta if self.adapter.layout == "map" else delta.mT.unflatten(2, y.shape[2:])
        if self.adapter.layout == "map":
            delta = delta.permute(0, 2, 3, 1)
        return delta.reshape(*y.shape[:-1], delta.shape[-1])

    # --- routes --------------------------------------------------------------------------------------------------

    def _routed(self, x: Tensor, y: Tensor, route: Route) -> Tensor | None:
        """The routed output for x (as the type wants it); None: nothing is added."""
        if self._active.watch is not None:
            self._active.watch(self.site.name, self._summary(x))
        if not any(self.has(slot) for slot in route.slots):
            return None
        if route.router is not None:
            return self._mixture(x, y, route.slots, route.router(self._summary(x)))
        if route.weights_BU is not None:
            return self._mixture(x, y, route.slots, self._per_row(route.weights_BU, x))
        if route.index_B is None:
            return self._one(x, self.params(route.slots[0]), y)
        return self._choice(x, y, route.slots, self._per_row(route.index_B, x))

    def _summary(self, x: Tensor) -> Tensor:
        """What routers and watchers see: x, or of texts the mean over the tokens of each, [B, 1, D]."""
        mask_BN = self._active.mask_BN
        if mask_BN is None or x.shape[:2] != mask_BN.shape:
            return x
        weight_BN1 = mask_BN.unsqueeze(-1).to(x)
        # where, because 0 times what stands at an empty place is not always 0
        total_B1D = torch.where(mask_BN.unsqueeze(-1), x, 0).sum(1, keepdim=True)
        return total_B1D / weight_BN1.sum(1, keepdim=True).clamp_min(1)

    def _per_row(self, choices: Tensor, x: Tensor) -> Tensor:
        """One choice per row of x; the windows of an image share that of the image."""
        if self.site.windows and len(choices) and len(x) % len(choices) == 0:
            return choices.repeat_interleave(len(x) // len(choices), 0)
        if len(choices) != len(x):
            raise ClAdaptersError(f"the route has {len(choices)} samples, the batch has {len(x)}")
        return choices

    def _mixture(self, x: Tensor, y: Tensor, slots: tuple[int, ...], weights_BU: Tensor) -> Tensor:
        total: Tensor | None = None
        for slot, share_B in zip(slots, weights_BU.unbind(1), strict=True):
            if self.has(slot):
                delta = self._one(x, self.params(slot), y)
                part = delta * share_B.reshape(-1, *[1] * (delta.ndim - 1))
                total = part if total is None else total + part
        assert total is not None
        return total

    def _choice(self, x: Tensor, y: Tensor, slots: tuple[int, ...], index_B: Tensor) -> Tensor | None:
        """One slot per row; rows whose slot has no adapter here get zeros; None: that is all of them."""
        used = tuple(slot for slot in slots if str(slot) in self.slots)
        stack = self._stacked(used)
        index_B = stack.rows(slots, index_B.device)[index_B]
        rows = None if len(used) == len(slots) else (index_B >= 0).nonzero().flatten()
        if rows is not None:
            if not len(rows):
                return None
            x, y, index_B, whole = x[rows], y[rows], index_B[rows], len(x)
        gathered = {name: value.index_select(0, index_B) for name, value in stack.tensors.items()}
        delta = self._one(x, gathered, y)
        return delta if rows is None else delta.new_zeros(whole, *delta.shape[1:]).index_copy(0, rows, delta)

    def _stacked(self, used: tuple[int, ...]) -> SlotStack:
        """The tensors of these slots, stacked; where no gradient flows, kept for the next batch."""
        if torch.is_grad_enabled():
            return SlotStack.of({slot: self.slots[str(slot)] for slot in used}, keep=False)
        if not self._stack.holds(used):
            self._stack = SlotStack.of({slot: self.slots[str(slot)] for slot in used}, keep=True)
        return self._stack

    def _one(self, x: Tensor, params: Mapping[str, Tensor], y: Tensor) -> Tensor:
        return self.adapter.apply(x, params, self._active.dropout_generator, y)
