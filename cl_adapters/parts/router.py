"""The expandable router of SEMA: at every expandable block, which share each adapter has for each image.

Source: SEMA (Wang et al. 2025, Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual Learning),
released code sema_block.py:80-95 (growth) and 137-142 (mixture).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import Route
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.parts.base import parts
from cl_adapters.parts.descriptors import pooled
from cl_adapters.parts.per_block import PerBlock, saved_entries, widths_of


@parts.register("mixture")
class ExpandableRouter(PerBlock):
    """Soft routers: per expandable block one row per adapter there.

    With K adapters at a block and p the mean over the tokens of the site's input,

        m = softmax(R p + r),   delta(x) = sum_k m_k A_k(x)

    one weight vector per image (at sites inside attention windows: per window). Rows are parameters of their own:
    growing leaves old rows as they are, bit by bit, and a new row trains alone under the softmax over all.

    Args:
        widths: expandable block to the width D of its sites' input.

    Raises:
        ClAdaptersError: no expandable block, or a width below 1.
    """

    def grow(self, block: int, slot: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Append the router row of one more adapter at a block: weight [D] and bias [1], ready to be trained.

        The start values are U(-1/sqrt(D), 1/sqrt(D)), as those of torch's Linear, drawn on the CPU.

        Raises:
            ClAdaptersError: the block is not expandable, or has a row of that slot.
        """
        weight_D, bias_1 = torch.empty(self.width(block)), torch.empty(1)
        for value in (weight_D, bias_1):
            value.uniform_(-(len(weight_D) ** -0.5), len(weight_D) ** -0.5, generator=generator)
        return self._enter(block, slot, _Row(weight_D, bias_1))

    def weights(self, block: int, x_BND: Tensor) -> Tensor:
        """Mixture weights m [B, K] for the site's input [B, N, D] or [B, D, H, W]; every row sums to 1.

        Raises:
            ClAdaptersError: the block has no adapter to mix.
        """
        rows = list(self.entries(block).values())
        if not rows:
            raise ClAdaptersError(f"block {block} has no adapter to mix yet: grow it first")
        weight_KD = torch.stack([row.get_parameter("weight") for row in rows])
        bias_K = torch.cat([row.get_parameter("bias") for row in rows])
        return F.linear(pooled(x_BND), weight_KD, bias_K).softmax(1)

    def router(self, block: int) -> Callable[[Tensor], Tensor]:
        """:meth:`weights` of one block, for :meth:`cl_adapters.bank.routes.Route.mixed`."""
        return functools.partial(self.weights, block)

    def routes(self, bank: AdapterBank) -> dict[str, Route]:
        """The route of every site of the bank.

        All sites of an expandable block (LoRA has two) share its router; each asks it with its own input. The other
        blocks use slot 0. Where there is one adapter its weight is exactly 1 and no router is needed; but a row that
        is being trained is asked all the same: its gradient is 0, and weight decay reaches it as in the released code.
        A block without adapters stays bare.
        """
        routes: dict[str, Route] = {}
        for site in bank.sites:
            expandable = site.block in self.widths
            slots = self.slots(site.block) if expandable else tuple(range(min(bank.num_slots, 1)))
            if len(slots) > 1 or (expandable and self._in_training(site.block)):
                routes[site.name] = Route.mixed(slots, self.router(site.block))
            elif slots:
                routes[site.name] = Route.single(slots[0])
        return routes

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExpandableRouter:
        """The mixture of which these are description and tensors; its rows are frozen, as after every task."""
        mixture = cls(widths_of(description))
        for block, slot, own in saved_entries(description, tensors):
            mixture._enter(block, slot, _Row(own["weight"], own["bias"]))
        mixture.freeze()
        return mixture

    def _in_training(self, block: int) -> bool:
        return any(parameter.requires_grad for parameter in self.entries(block).parameters())


def router_widths(bank: AdapterBank, blocks: Sequence[int]) -> dict[int, int]:
    """The one input width of all sites of each of these blocks, for :class:`ExpandableRouter`.

    Raises:
        ConfigError: sites of one block read different widths.
    """
    found: dict[int, int] = {}
    for block in sorted(blocks):
        width_of = {site.kind: site.width for site in bank.sites if site.block == block}
        if len(set(width_of.values())) > 1:
            listed = ", ".join(f"{kind} {width}" for kind, width in width_of.items())
            raise ConfigError(
                f"all sites of an expandable block share its router, but the adapter's sites of block {block} read "
                f"inputs of different widths: {listed}. Choose sites (of LoRA: targets) that read the same width"
            )
        found[block] = next(iter(width_of.values()))
    return found


class _Row(nn.Module):
    """The logit of one adapter: weight [D], bias [1]."""

    def __init__(self, weight_D: Tensor, bias_1: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_D)
        self.bias = nn.Parameter(bias_1)
