"""The mixture of SEMA: at every expandable block the router shares each image out among the adapters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.bank.routes import Route
from cl_adapters.errors import ClAdaptersError
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.router import ExpandableRouter
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("mixture")
@dataclass(frozen=True, kw_only=True)
class MixtureOfAdapters(Predictor):
    """Soft mixture at every expandable block, and the linear head: one pass, and no descriptor is run.

    The adapter that is named for an image is the one with the largest share at the last expandable block. Needs the
    part "mixture" (:class:`cl_adapters.parts.router.ExpandableRouter`).
    """

    summary: ClassVar[str] = "SEMA: one pass through routed mixtures of adapters"
    remembers: ClassVar[bool] = False

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits on the features under the mixture."""
        mixture = model.part("mixture", ExpandableRouter)
        if model.bank is None:
            raise ClAdaptersError("this model has no adapters to mix")
        routes = mixture.routes(model.bank)
        last = [site.name for site in model.bank.sites if site.block == mixture.blocks[-1] and site.name in routes]
        shares: list[Tensor] = []
        if last and len(routes[last[-1]].slots) > 1:
            routes[last[-1]] = _noting(routes[last[-1]], shares)
        f_BD = features.mixed(routes)
        slots = torch.tensor(routes[last[-1]].slots if last else (-1,))
        # windows of one image lie one after the other, and the image's share is their mean
        best_B = shares[0].reshape(features.batch, -1, len(slots)).mean(1).argmax(1).cpu() if shares else None
        adapter_B = slots.repeat(features.batch) if best_B is None else slots[best_B]
        return Prediction(model.head(f_BD), adapter_B, features.passes_B)


def _noting(route: Route, shares: list[Tensor]) -> Route:
    """The same route, which also puts its weights [B, K] into ``shares``."""
    router = route.router
    assert router is not None

    def note(x_BND: Tensor) -> Tensor:
        shares.append(router(x_BND))
        return shares[-1]

    return dataclasses.replace(route, router=note)
