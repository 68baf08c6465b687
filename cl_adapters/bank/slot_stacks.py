"""SlotStack: the tensors of several slots at one site in one piece, kept from batch to batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.bank.routes import BARE


@dataclass
class SlotStack:
    """The tensors of several slots at one site, one after the other: a copy, good until any of them changes.

    Attributes:
        used: the slots, in order.
        tensors: name to the stacked tensors.
        modules: the slots' own modules, and
        parameters: theirs, one after the other, with
        state: version and address of each, as they were.
        place: for the slots of the last route (``route``): the row of each in the stack, -1: it has none here.
    """

    used: tuple[int, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    state: list[tuple[int, int]] = field(default_factory=list)
    route: tuple[int, ...] = ()
    place: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotStack:
        return SlotStack()

    @classmethod
    def of(cls, slots: Mapping[int, nn.Module], keep: bool) -> SlotStack:
        """Stack these slots; ``keep``: note what is needed to tell later whether they have changed."""
        params = [dict(module.named_parameters()) for module in slots.values()]
        made = cls(tuple(slots), {name: torch.stack([own[name] for own in params]) for name in params[0]})
        flat: list[Tensor] = [value for own in params for value in own.values()]
        if keep and not any(value.is_inference() for value in flat):  # nobody counts writes into inference tensors
            made.modules, made.parameters, made.state = list(slots.values()), flat, _state(flat)
        return made

    def holds(self, slots: tuple[int, ...]) -> bool:
        """Whether all of these were stacked and nothing that was stacked has changed since."""
        if not self.modules or (slots != self.used and not set(slots) <= set(self.used)):
            return False
        # .parameters() would cost more than all of the rest
        now = [value for module in self.modules for value in module._parameters.values()]
        return all(map(operator.is_, now, self.parameters)) and _state(self.parameters) == self.state

    def rows(self, slots: tuple[int, ...], device: torch.device) -> Tensor:
        """The row of each slot, int64; -1 for those that were not stacked."""
        if slots != self.route or self.place.device != device:
            row = {slot: place for place, slot in enumerate(self.used)}
            self.route, self.place = slots, torch.tensor([row.get(slot, BARE) for slot in slots], device=device)
        return self.place


def _state(parameters: list[Tensor]) -> list[tuple[int, int]]:
    return [(value._version, value.data_ptr()) for value in parameters]
