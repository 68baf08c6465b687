"""What parts share that keep something for every adapter at every expandable block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.errors import ClAdaptersError
from cl_adapters.parts.base import Part


class PerBlock(Part):
    """Base of parts with one entry per (expandable block, slot).

    Args:
        widths: expandable block to the width D of its sites' input.

    Attributes:
        widths: as given, blocks in order.
        at: block to slot to entry; keys are texts.

    Raises:
        ClAdaptersError: no expandable block, or a width below 1.
    """

    _anchor: Tensor

    def __init__(self, widths: Mapping[int, int]) -> None:
        super().__init__()
        if not widths or min(widths.values()) < 1:
            raise ClAdaptersError(f"expandable blocks with widths of 1 or more are needed, got {dict(widths)}")
        self.widths = dict(sorted(widths.items()))
        self.at = nn.ModuleDict({str(block): nn.ModuleDict() for block in self.widths})
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # tells device and dtype of new entries

    @property
    def blocks(self) -> tuple[int, ...]:
        """The expandable blocks, in order."""
        return tuple(self.widths)

    def width(self, block: int) -> int:
        """D at one block.

        Raises:
            ClAdaptersError: the block is not expandable.
        """
        if block not in self.widths:
            raise ClAdaptersError(f"block {block} is not expandable; these are: {', '.join(map(str, self.blocks))}")
        return self.widths[block]

    def slots(self, block: int) -> tuple[int, ...]:
        """The slots with an entry at one block, in order of arrival.

        Raises:
            ClAdaptersError: the block is not expandable.
        """
        return tuple(int(slot) for slot in self.entries(block))

    def freeze(self, block: int | None = None) -> None:
        """Take everything, or what is kept at one block, out of training."""
        for at in self.blocks if block is None else (block,):
            for parameter in self.entries(at).parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    def entries(self, block: int) -> nn.ModuleDict:
        """What is kept at one block, by slot (as text).

        Raises:
            ClAdaptersError: the block is not expandable.
        """
        self.width(block)
        found = self.at[str(block)]
        assert isinstance(found, nn.ModuleDict)
        return found

    def description(self) -> dict[str, Any]:
        """Widths and slots per block."""
        return {
            "widths": {str(block): width for block, width in self.widths.items()},
            "slots": {str(block): list(self.slots(block)) for block in self.blocks},
        }

    def _enter(self, block: int, slot: int, entry: nn.Module) -> list[nn.Parameter]:
        """Add an entry; its parameters."""
        if slot in self.slots(block):
            raise ClAdaptersError(f"slot {slot} is known at block {block} already: give the number of the new adapter")
        self.entries(block)[str(slot)] = entry.to(self._anchor)
        return list(entry.parameters())


def widths_of(description: Mapping[str, Any]) -> dict[int, int]:
    """The widths in a description, whose keys are texts."""
    return {int(block): int(width) for block, width in description["widths"].items()}


def saved_entries(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[tuple[int, int, dict[str, Tensor]]]:
    """Block, slot and tensors (copies, by their name in the entry) of every entry, in order of arrival."""
    found = []
    for block, slots in description["slots"].items():
        for slot in slots:
            prefix = f"at.{block}.{slot}."
            own = {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
            found.append((int(block), int(slot), own))
    return found
