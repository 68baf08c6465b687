"""The pooled input of the adapters at some blocks, batch by batch: what SEMA's descriptors see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cl_adapters.bank.bank import Routes
from cl_adapters.model.encoder import AdaptedEncoder
from cl_adapters.parts.novelty import pooled
from cl_adapters.strategies._loop.activation_cache import ActivationCache


def pooled_inputs(
    model: AdaptedEncoder,
    loader: Iterable[Sequence[Tensor]],
    blocks: Sequence[int],
    routes: Routes | None,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Per batch the pooled input [B, D] of the adapters at each of these blocks.

    Args:
        model: backbone and bank.
        loader: batches that begin with images, or with the inputs of the block ``loader.start``.
        blocks: whose first site is watched.
        routes: the adapters of the pass.
        start: the block whose inputs a loader without that attribute yields.
        stop: end the pass at the input of this block.
    """
    assert model.bank is not None
    first = {block: next(site.name for site in model.bank.sites if site.block == block) for block in blocks}
    block_of = {name: block for block, name in first.items()}
    start = getattr(loader, "start", start)
    for x, *_ in loader:
        seen: dict[int, Tensor] = {}

        def watch(site: str, x_BND: Tensor, seen: dict[int, Tensor] = seen) -> None:
            if site in block_of:
                seen[block_of[site]] = pooled(x_BND)

        with torch.no_grad():
            model.features(x.to(model.device), routes, start=start, stop=stop, watch=watch)
        yield seen


class StoredInputs:
    """The same for a cache of activations: they are small, so that one pass over the cache serves all epochs.

    Args:
        model: backbone and bank.
        cache: of the task's images.
        blocks: whose first site is watched.
        routes: the adapters of the pass.
        batch: images per forward pass.
    """

    def __init__(
        self, model: AdaptedEncoder, cache: ActivationCache, blocks: Sequence[int], routes: Routes | None, batch: int
    ) -> None:
        depth = min(blocks)
        batches = (cache.at(depth, routes).read(*rows) for rows in cache.everything(batch))
        loader = ([h] for h in batches)
        parts = list(pooled_inputs(model, loader, blocks, routes, start=depth, stop=max(blocks) + 1))
        self._cache = cache
        self._inputs = {block: torch.cat([part[block] for part in parts]) for block in blocks}

    def drawn(self, batch: int, generator: torch.Generator) -> Iterator[Mapping[int, Tensor]]:
        """One epoch in a new order, a view of every image."""
        for rows in self._cache.batches(batch, generator):
            yield {block: p_MD[rows] for block, p_MD in self._inputs.items()}
