"""AdaptedEncoder: a frozen backbone and the bank of adapters on it; from inputs and routes to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import Routes
from cl_adapters.bank.site_adapters import Watch
from cl_adapters.errors import ClAdaptersError


class AdaptedEncoder(nn.Module):
    """A backbone with adapters.

    Attributes:
        backbone: frozen encoder.
        bank: adapters; None for strategies that train none.
    """

    def __init__(self, backbone: FrozenBackbone, bank: AdapterBank | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.bank = bank

    @property
    def num_slots(self) -> int:
        """Adapters in the bank."""
        return 0 if self.bank is None else self.bank.num_slots

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self.backbone.device

    def features(
        self,
        x: Inputs,
        routes: Routes | None,
        dropout_generator: torch.Generator | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Features [B, D] with the given adapters (None: the bare backbone).

        Args:
            x: B inputs, or with ``start`` the inputs of that block.
            routes: who uses which adapter.
            dropout_generator: generator of dropout masks (training).
            start: go on from the input of this block; None: from the beginning.
            stop: end at the input of this block (``backbone.depth``, None: the features) and return that.
            watch: called with the input of every site that has a route.

        Raises:
            ClAdaptersError: routes without a bank.
        """
        if self.bank is None:
            if routes is not None:
                raise ClAdaptersError("this model has no adapters to route to")
            return self._run(x, start, stop)
        with self.bank.route(routes, dropout_generator, watch):
            return self._run(x, start, stop)

    def _run(self, x: Inputs, start: int | None, stop: int | None) -> Tensor:
        if start is not None:
            assert isinstance(x, Tensor)
            return self.backbone.resume(x, start, stop)
        return self.backbone.features(x) if stop is None else self.backbone.enter(x, stop)
