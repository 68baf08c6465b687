"""A user's own module as a backbone: with sites of their own, without any, without even a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.sites.sites import Site, Tap


@dataclass(frozen=True, kw_only=True)
class _Fold(AdapterType):
    """Adds the first 16 numbers of its input."""

    @property
    def site_kinds(self) -> tuple[str, ...]:
        return ("ffn_parallel",)

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
        return x_BND[..., :16] * params["gain"]


class Own(nn.Module):
    """A user's encoder: patches of 8 x 8, two residual feed-forward blocks, mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).flatten(2).mT
        for ffn in self.ffn:
            tokens = tokens + ffn(tokens)
        return tokens.mean(1)


def own_sites(**changes: Any) -> list[Site]:
    values = [
        {
            "name": f"ffn.{i}",
            "block": i,
            "kind": "ffn_parallel",
            "width": 16,
            "source": Tap(f"ffn.{i}", "in"),
            "target": Tap(f"ffn.{i}", "out"),
        }
        for i in range(2)
    ]
    return [Site(**{**value, **changes}) for value in values]


def test_own_module_with_given_sites(filled: Callable[..., AdapterBank]) -> None:
    backbone, x = FrozenBackbone.wrap(Own(), sites=own_sites()), torch.randn(4, 3, 16, 16)
    bank = filled(backbone, Bottleneck(bottleneck=4))
    plain = backbone.features(x)
    mixed = [0, 2, 1, 0]
    with bank.route(Route.hard(torch.tensor(mixed))):
        together = backbone.features(x)
    assert not torch.allclose(together, plain)
    for i, slot in enumerate(mixed):
        with bank.route(Route.single(slot)):
            assert torch.allclose(backbone.features(x[i : i + 1]), together[i : i + 1], atol=1e-5)


def test_source_tap_may_be_an_output() -> None:
    """A site that reads what another module puts out."""
    sites = own_sites(source=Tap("ffn.1.0", "out"), width=32)[1:]
    backbone = FrozenBackbone.wrap(Own(), sites=[*sites])
    bank = AdapterBank(backbone, _Fold())
    bank.add_slot(bank.fresh(torch.Generator()))
    x = torch.randn(2, 3, 16, 16)
    hidden: list[Tensor] = []
    backbone.encoder.get_submodule("ffn.1.0").register_forward_hook(lambda module, args, out: hidden.append(out))
    plain = backbone.features(x)
    with bank.route(Route.single(0)):
        routed = backbone.features(x)
    assert torch.allclose(routed - plain, hidden[0][..., :16].mean(1), atol=1e-5)


def test_own_module_without_sites_says_what_to_do() -> None:
    with pytest.raises(IncompatibleBackbone, match=r"no known adapter sites in Own.*FrozenBackbone\.wrap"):
        AdapterBank(FrozenBackbone.wrap(Own()), Bottleneck())
    with pytest.raises(IncompatibleBackbone, match="was given no site of kind 'ffn_sequential'"):
        AdapterBank(FrozenBackbone.wrap(Own(), sites=own_sites()), Bottleneck(mode="sequential"))


def test_site_that_names_no_module() -> None:
    backbone = FrozenBackbone.wrap(Own(), sites=own_sites(target=Tap("fnn.0", "out")))
    with pytest.raises(IncompatibleBackbone, match=r"'fnn\.0'"):
        AdapterBank(backbone, Bottleneck())


def test_unknown_feature_width_says_what_to_do() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(IncompatibleBackbone, match="pass num_features="):
        FrozenBackbone.wrap(module)
    assert FrozenBackbone.wrap(module, num_features=5).features(torch.zeros(2, 3, 2, 2)).shape == (2, 5)


def test_module_without_parameters() -> None:
    """A fixed feature extractor has a device and a fingerprint too."""
    backbone = FrozenBackbone.wrap(nn.Flatten(), num_features=12)
    assert backbone.device == torch.device("cpu")
    assert len(backbone.fingerprint) == 64
    model = AdapterModel(backbone)
    model.add_task([0])
    model.prototypes.append(torch.ones(1, 12))
    assert model.predict(torch.ones(2, 3, 2, 2)).tolist() == [[pytest.approx(1)], [pytest.approx(1)]]
