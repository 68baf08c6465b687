"""What an adapter type is: named tensors plus a pure function. Bank, merging and files know no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from cl_adapters.config import build, split_name, to_plain
from cl_adapters.errors import ConfigError
from cl_adapters.registry import Registry
from cl_adapters.sites.sites import Layout, Site


class AdapterType(ABC):
    """Base of the adapter types: frozen dataclasses of hyper-parameters without any tensor.

    Shape letters: B batch, N tokens, D width of the site's source, O width of what is added (mostly D).

    Attributes:
        layout: how the type wants activations: "tokens" ([B, N, D], from every site) or "map" ([B, D, H, W], only from
            sites whose tokens lie on a grid).
        aligned: whether equal positions mean the same in adapters that were trained apart, so that they may be merged
            number by number.
    """

    summary: ClassVar[str] = ""
    layout: ClassVar[Layout] = "tokens"
    aligned: ClassVar[bool] = False

    @property
    @abstractmethod
    def site_kinds(self) -> tuple[str, ...]:
        """Kinds of :class:`cl_adapters.sites.sites.Site` that it attaches to, in every block."""

    def at(self, site: Site) -> AdapterType:
        """The type at work at one of its sites: this one, unless it is made of several."""
        return self

    @abstractmethod
    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of one adapter at this site."""

    @abstractmethod
    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 tensors on the CPU, all draws from ``generator``."""

    @abstractmethod
    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """The adapter's output delta, to be added at the site's target.

        Args:
            x_BND: [B, N, D], read at the site's source ([B, D, H, W] for types with layout "map").
            params: tensors of :meth:`shapes`; either as they are (one adapter for all samples) or each with one
                more leading dimension B (one adapter per sample).
            dropout_generator: generator of the dropout masks while training; None (no dropout) otherwise.
            y_BNO: what stands at the target before delta is added, for types that need it; None: unknown.

        Returns:
            delta_BNO, [B, N, O].
        """

    @property
    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter adds exactly nothing."""
        return True

    def delta_factors(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The adapter at one site as a low-rank change of a weight matrix, dW = B A, all scales folded in.

        Args:
            params: tensors of :meth:`shapes`, of any rank.

        Returns:
            A [r, D] and B [O, r]; None: the type is no linear map, so it cannot be merged as one.
        """
        return None

    def from_factors(self, a_RD: Tensor, b_OR: Tensor) -> tuple[AdapterType, dict[str, Tensor]]:
        """The inverse of :meth:`delta_factors`: this type at the rank of A [r, D] and B [O, r], and its tensors.

        Raises:
            ConfigError: the type has no delta, or its options cannot express this one.
        """
        raise ConfigError(f"adapters of type {type(self).__name__} are no linear maps and have no low-rank factors")

    def num_parameters(self, site: Site) -> int:
        """Numbers in one adapter at one site."""
        return sum(torch.Size(shape).numel() for shape in self.shapes(site).values())


adapters: Registry[type[AdapterType]] = Registry("adapter type", "cl_adapters.adapters", group="cl_adapters.adapters")


def adapter_from(value: Any) -> AdapterType:
    """An adapter type from a name, or from a mapping with "type" and its options.

    Raises:
        UnknownName: no such type.
        ConfigError: unknown option, wrong type or range; a configuration of PEFT, which needs a backbone.
    """
    if isinstance(value, AdapterType):
        return value
    if hasattr(value, "peft_type") or (isinstance(value, Mapping) and "peft_type" in value):
        raise ConfigError(
            "a configuration of PEFT names layers of one backbone; read it for yours with "
            "cl_adapters.interchange.lora_from_peft(config, backbone), which gives the options adapter and blocks"
        )
    name, options = split_name(value, "adapter", default="bottleneck")
    return build(adapters.get(name), options, "adapter")


def adapter_to_plain(adapter: AdapterType) -> dict[str, Any]:
    """The mapping from which :func:`adapter_from` makes the same type again."""
    return {"type": adapters.name_of(adapter)} | to_plain(adapter)


AdapterField: TypeAlias = Annotated[AdapterType, BeforeValidator(adapter_from), PlainSerializer(adapter_to_plain)]
"""An adapter type as a field of a configuration dataclass."""
