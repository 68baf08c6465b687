"""What the adapters at some blocks see of a task's images: for methods that look at it besides training on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cl_adapters.backbones.inputs import to_device
from cl_adapters.bank.bank import Routes
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.descriptors import pooled
from cl_adapters.strategies._loop.activation_cache import ActivationCache
from cl_adapters.strategies._loop.order import Draw

Images = Iterable[Sequence[Tensor]]
"""Batches whose first tensor is the images, or, with an attribute ``start``, the inputs of that block."""


class AdapterInputs:
    """The pooled input [B, D] of the adapters at each of some blocks.

    Args:
        model: backbone and bank.
        routes: the adapters of a pass; asked before every batch, since they may change between two.
        blocks: where to look.
        whole: run every pass to its end, though nothing behind the last of the blocks is looked at.
    """

    def __init__(
        self, model: AdapterModel, routes: Callable[[], Routes], blocks: Sequence[int], *, whole: bool
    ) -> None:
        assert model.bank is not None
        self.blocks = blocks
        self._model = model
        self._routes = routes
        self._stop = None if whole else max(blocks) + 1
        sites = model.bank.sites
        self._block_of = {next(site.name for site in sites if site.block == block): block for block in blocks}

    def read(self, images: Images, start: int | None = None) -> Iterator[dict[int, Tensor]]:
        """Block to [B, D], batch by batch.

        Args:
            images: one pass.
            start: the block whose inputs they are, where they do not say so themselves; None: they are images.
        """
        start = getattr(images, "start", start)
        for x, *_ in images:
            seen: dict[int, Tensor] = {}

            def watch(site: str, x_BND: Tensor, seen: dict[int, Tensor] = seen) -> None:
                if site in self._block_of:
                    seen[self._block_of[site]] = pooled(x_BND)

            with torch.no_grad():
                inputs = to_device(x, self._model.device)
                self._model.features(inputs, self._routes(), start=start, stop=self._stop, watch=watch)
            yield seen

    def passes(
        self, cache: ActivationCache | None, images: Callable[[], Images], *, batch: int, draw: Draw, read: int
    ) -> Callable[[int], Iterable[Mapping[int, Tensor]]]:
        """Epoch to block to [B, D], batch by batch in a new order; adapters must stay as they are meanwhile.

        Args:
            cache: of the task's images: what is looked at is small, so that all epochs are one pass over it.
            images: gives a new pass; used where nothing is cached.
            batch: images per batch.
            draw: gives the generator of the next pass.
            read: images per forward pass over the cache.
        """
        if cache is None:
            return lambda epoch: self.read(images())
        depth, routes = min(self.blocks), self._routes()
        stored = (cache.at(depth, routes).read(*rows) for rows in cache.everything(read))
        parts = list(self.read(([h] for h in stored), start=depth))
        whole = {block: torch.cat([part[block] for part in parts]) for block in self.blocks}
        return lambda epoch: (
            {block: p_MD[rows] for block, p_MD in whole.items()} for rows in cache.batches(batch, draw())
        )
