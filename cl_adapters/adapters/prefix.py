"""Prefix tuning: learned keys and values that every token may attend to.

Per head, with q, K, V the projections of the tokens and S = q K^T / sqrt(hd), T = q P_K^T / sqrt(hd), the attention
over both has the mass lambda on the prefix:

    lambda = sigmoid(logsumexp(T) - logsumexp(S))
    out    = (1 - lambda) softmax(S) V + w softmax(T) P_V

Plain attention has w = lambda. LAE compensates: the prefix columns are divided by their mass, so w = 1 and the rows
sum to 2 - lambda. The first term is what the backbone computes anyway, so the adapter adds the rest to it, inside the
attention and before its output projection:

    delta  = w softmax(T) P_V - lambda softmax(S) V

Attention does not see positions, so where the prefix stands among the tokens (LAE: after the class token) is no option.
Where queries and keys are rotated by their positions, the prefix's keys are learned as they are after it (as in PEFT);
where several queries share a key, each has its own prefix; where logits are capped (Gemma 2), the prefix's are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.adapters.bottleneck import lifted
from cl_adapters.config import check_range
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.sites import Site


@adapters.register("prefix")
@dataclass(frozen=True, kw_only=True)
class Prefix(AdapterType):
    """Prefix tuning (Li & Liang 2021) in the form of LAE (Gao et al. 2023; released pet/prefix.py:34-46).

    A fresh prefix is not the identity: the tokens attend to it from the first step on, whatever its numbers are.

    Attributes:
        length: P, learned keys and values per head.
        learn_scale: keys and values are each multiplied by a trained number that starts at 1.
        compensate: divide the attention on the prefix by its mass lambda, so that the prefix counts the same however
            little the tokens attend to it.
    """

    summary: ClassVar[str] = "learned keys and values in the attention, with LAE's compensation"

    length: int = 10
    learn_scale: bool = True
    compensate: bool = True

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "length")

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Inside the attention: reads its queries and what tells their mass, adds to what its heads put out."""
        return ("attention",)

    @property
    def starts_as_identity(self) -> bool:
        """Never: attention on new columns takes weight from the old ones."""
        return False

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """key and value, each [P, H, hd]; with ``learn_scale`` scale_key and scale_value [1].

        Raises:
            IncompatibleBackbone: the site does not say how many heads it has.
        """
        if site.heads < 1 or site.out_width % site.heads:
            raise IncompatibleBackbone(
                f"site {site.name!r}: a prefix needs Site.heads, a divisor of {site.out_width}, but got {site.heads}"
            )
        vectors = (self.length, site.heads, site.out_width // site.heads)
        shapes: dict[str, tuple[int, ...]] = {"key": vectors, "value": vectors}
        return shapes | {"scale_key": (1,), "scale_value": (1,)} if self.learn_scale else shapes

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Keys and values uniform in [0, 0.01] (LAE), scales 1."""
        params = {name: torch.ones(shape) for name, shape in self.shapes(site).items()}
        for name in ("key", "value"):
            params[name].uniform_(0, 0.01, generator=generator)
        return params

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """The difference to the attention without the prefix.

        Args:
            x_BND: [B, N, 3 O], queries, keys and values side by side; or [B, N, O + H], queries that are scaled already
                and per head logsumexp(S), from an attention with a mask or with positions in its queries and keys.
            params: as from :meth:`shapes`, or each with one more leading dimension B.
            dropout_generator: not used.
            y_BNO: [B, N, O], output of the heads without the prefix; of queries, keys and values computed where None.

        Returns:
            delta_BNO, [B, N, O].
        """
        keys, values = params["key"], params["value"]
        if self.learn_scale:
            keys, values = keys * lifted(params["scale_key"], 3), values * lifted(params["scale_value"], 3)
        heads, width = keys.shape[-2:]
        if x_BND.shape[-1] == 3 * heads * width:
            q, k, v = x_BND.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)  # each [B, H, N, hd]
            q = q * width**-0.5
            own = q @ k.mT  # S, [B, H, N, N]
            total = own.logsumexp(-1, keepdim=True)
            y = own.softmax(-1) @ v if y_BNO is None else y_BNO.unflatten(-1, (heads, width)).transpose(1, 2)
        else:
            assert y_BNO is not None  # what the heads put out without the prefix cannot be told from their queries
            q = x_BND[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
            total = x_BND[..., heads * width :].mT.unsqueeze(-1)
            y = y_BNO.unflatten(-1, (heads, width)).transpose(1, 2)
        ahead = q @ keys.transpose(-3, -2).mT  # T, [B, H, N, P]
        mass = torch.sigmoid(ahead.logsumexp(-1, keepdim=True) - total)
        # LAE's floor: a prefix that no token sees at all stays without effect
        weight = mass / mass.clamp_min(1e-12) if self.compensate else mass
        delta: Tensor = weight * (ahead.softmax(-1) @ values.transpose(-3, -2)) - mass * y
        return delta.transpose(1, 2).flatten(2)
