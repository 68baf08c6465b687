"""What the contract tests share: variants of every adapter type, a backbone for each, filled banks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.sites.sites import Layout, Site
from tests.contracts.families import FAMILIES, Case, case_of

NUMBERS: dict[str, tuple[Any, ...]] = {"dropout": (0.0, 0.5), "kernel": (1, 3)}
"""Fields without a list of choices whose values switch something on or off."""


def options_of(name: str, hint: Any) -> tuple[Any, ...]:
    """The values of a field worth trying."""
    if get_origin(hint) is tuple:  # any number of choices: each alone, and all
        each = get_args(get_args(hint)[0])
        return (*[(choice,) for choice in each], each)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return (True, False) if hint is bool else NUMBERS.get(name, ())


def variants(cls: type[AdapterType]) -> Iterator[tuple[str, AdapterType]]:
    """The type with its defaults, each of its choices one at a time, and all of them at once."""
    default: Any = cls()
    yield "default", default
    hints = get_type_hints(cls)
    last: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        for option in options_of(field.name, hints[field.name]):
            if option != getattr(default, field.name):
                last[field.name] = option
                yield f"{field.name}={option}", dataclasses.replace(default, **{field.name: option})
    if len(last) > 1:
        yield "every other choice", dataclasses.replace(default, **last)


VARIANTS = [
    pytest.param(adapter, id=f"{name} {label}")
    for name in adapters.names()
    for label, adapter in variants(adapters.get(name))
]


@pytest.fixture(params=VARIANTS)
def adapter(request: pytest.FixtureRequest) -> AdapterType:
    """Every registered adapter type in every choice of its options."""
    chosen: AdapterType = request.param
    return chosen


# --- backbones ----------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A fresh tiny backbone of every family."""
    return case_of(request.param)


@pytest.fixture
def home(adapter: AdapterType) -> Case:
    """A backbone that takes the adapter type: a ViT; a ConvNeXt for feature maps, SwiGLU for a gate."""
    if "gate" in adapter.site_kinds:
        return case_of("transformers DINOv2, SwiGLU")
    return case_of("ViT" if adapter.layout == "tokens" else "ConvNeXt")


Filled = Callable[..., AdapterBank]


@pytest.fixture
def filled() -> Filled:
    """Factory of banks with random adapters: ``filled(backbone, adapter, slots=3)``."""

    def make(backbone: FrozenBackbone, adapter: AdapterType, slots: int = 3, size: float = 0.3) -> AdapterBank:
        bank = AdapterBank(backbone, adapter)
        for slot in range(slots):
            generator = torch.Generator().manual_seed(100 + slot)
            tensors: dict[str, Tensor] = bank.fresh(generator)
            bank.add_slot({k: size * torch.randn(v.shape, generator=generator) for k, v in tensors.items()})
        return bank

    return make


@dataclass(frozen=True, kw_only=True)
class Echo(AdapterType):
    """Adds its own input: shows what a site reads and where it adds."""

    kind: str = "ffn_parallel"

    @property
    def site_kinds(self) -> tuple[str, ...]:
        return (self.kind,)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"gain": (1,)}

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.ones(1)}

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        noise: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        return x_BND * params["gain"].reshape(-1, *[1] * (x_BND.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class EchoMap(Echo):
    """The same, seen as feature maps."""

    layout: ClassVar[Layout] = "map"


@pytest.fixture
def echo_of() -> Callable[..., AdapterType]:
    """Factory of adapters that add their own input: ``echo_of(kind="ffn_parallel", layout="tokens")``."""
    return lambda kind="ffn_parallel", layout="tokens": (EchoMap if layout == "map" else Echo)(kind=kind)
