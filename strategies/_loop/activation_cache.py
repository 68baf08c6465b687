"""The activation cache: what does not change while a task trains is computed once.

When only the last blocks of the backbone have trained adapters, the activations before the first of them are the same
in every epoch. K augmented views of each training image are run up to that block once, and the epochs read them back:
an epoch then costs the last blocks alone. Fewer different augmentations are seen than without (K instead of one per
epoch); without augmentation one view gives the numbers of the uncached run.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_adapters._seeding import isolated, seed_globals
from cl_adapters.backbones.inputs import Inputs, to_device
from cl_adapters.bank.bank import Routes
from cl_adapters.config import counted
from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies._loop.order import Draw, collate_of, length_batches, lengths_of, reading_options


class ActivationCache:
    """K views of one experience's training images at any depth of the model.

    Depths are computed when first asked for, from the deepest one that is known already.

    Args:
        model: backbone and bank.
        dataset: yields (image, label, ...), augmented by the global random generators; or texts, with ``lengths``.
        seeds: one per view, for the augmentation.
        batch: images per forward pass.
        memory_mb: limit per depth, see :class:`HiddenStore`.
        options: of the data loader: ``num_workers``, ``pin_memory``, and ``shuffle`` (False: passes come in the order
            of the data set).

    Attributes:
        labels: int64 [N], class labels.
    """

    def __init__(
        self,
        model: AdapterModel,
        dataset: Any,
        *,
        seeds: list[int],
        batch: int,
        memory_mb: float,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.labels = torch.tensor([int(label) for label in dataset.targets])
        self._lengths_N = lengths_of(dataset)
        self._dataset = dataset
        self._seeds = seeds if self._lengths_N is None else seeds[:1]  # texts are not augmented: views would be equal
        self._batch = counted(batch, "batch")
        self._memory_mb = memory_mb
        self._options = options or {}
        self._stores: dict[int, HiddenStore] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        """K."""
        return len(self._seeds)

    def at(self, block: int, routes: Routes | None) -> HiddenStore:
        """The inputs of one block (the backbone's ``depth``: the features) with these adapters before it."""
        if block not in self._stores:
            store: HiddenStore | None = None
            for view, start, h in self._through(routes, block):
                if store is None:
                    store = HiddenStore(self.views, len(self), h.shape[1:], self._memory_mb)
                store.write(view, start, h)
            assert store is not None
            self._stores[block] = store
        return self._stores[block]

    def everything(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(view, sample) of all K N images, view by view, in batches."""
        for view in range(self.views):
            for rows in torch.arange(len(self)).split(batch):
                yield torch.full_like(rows, view), rows

    def draw(self, generator: torch.Generator) -> Tensor:
        """A new order of the samples with a view for each, as places in :meth:`everything`; int64 [N]."""
        order = torch.randperm(len(self), generator=generator) if self._shuffled else torch.arange(len(self))
        chosen = torch.randint(self.views, (len(order),), generator=generator)
        return chosen * len(self) + order

    def batches(self, batch: int, generator: torch.Generator, drop_last: bool = False) -> Sequence[Tensor]:
        """A new order with a view for each sample, in batches: those of :meth:`draw`, or of similar length for texts.

        Returns:
            Places in :meth:`everything`, int64.
        """
        if self._lengths_N is None or not self._shuffled:
            parts: Sequence[Tensor] = self.draw(generator).split(batch)
            return parts[: len(self) // batch] if drop_last else parts
        rows = length_batches(self._lengths_N, batch, generator, drop_last=drop_last)
        chosen = torch.randint(self.views, (len(self),), generator=generator)
        return [chosen[part] * len(self) + part for part in rows]

    @property
    def _shuffled(self) -> bool:
        return bool(self._options.get("shuffle", True))

    def changed(self, block: int) -> None:
        """Forget what lies behind a block whose adapters changed."""
        self._stores = {depth: store for depth, store in self._stores.items() if depth <= block}

    def _through(self, routes: Routes | None, block: int) -> Iterator[tuple[int, int, Tensor]]:
        """(view, first sample, input of ``block``) batch by batch."""
        known = [depth for depth in self._stores if depth < block]
        device = self.model.device
        with torch.inference_mode():
            for view in range(self.views):
                start = 0
                for x in self._images(view) if not known else self._hidden(view, max(known)):
                    source = None if not known else max(known)
                    h = self.model.features(to_device(x, device), routes, start=source, stop=block)
                    yield view, start, h
                    start += len(h)

    def _images(self, view: int) -> Iterator[Inputs]:
        with isolated(self.model.device):
            seed_globals(self._seeds[view])
            reading = reading_options(self._options) | {"persistent_workers": False}  # it is read once
            collate = collate_of(self._dataset)
            for x, *_ in DataLoader(self._dataset, batch_size=self._batch, collate_fn=collate, **reading):
                yield x

    def _hidden(self, view: int, depth: int) -> Iterator[Inputs]:
        for rows in torch.arange(len(self)).split(self._batch):
            yield self._stores[depth].read(torch.full_like(rows, view), rows)


class CachedLoader:
    """Batches [h, label, task label] from a cache at one depth, in a new order and choice of views each time.

    Args:
        cache: where they come from.
        start: the block whose inputs they are.
        routes: the adapters before it.
        batch: samples per batch.
        draw: of each pass.
        drop_last: leave out an incomplete last batch, unless it is the only one.
    """

    def __init__(
        self,
        cache: ActivationCache,
        start: int,
        routes: Routes | None,
        *,
        batch: int,
        draw: Draw,
        drop_last: bool = False,
    ) -> None:
        self.start = start
        self._cache = cache
        self._store = cache.at(start, routes)
        self._batch = batch
        self._draw = draw
        self._drop_last = drop_last and len(cache) >= batch

    def __len__(self) -> int:
        return (math.floor if self._drop_last else math.ceil)(len(self._cache) / self._batch)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for places in self._cache.batches(self._batch, self._draw(), self._drop_last):
            rows = places % len(self._cache)
            labels = self._cache.labels[rows]
            yield [self._store.read(places // len(self._cache), rows), labels, torch.zeros_like(labels)]


class HiddenStore:
    """Activations of K views of N samples at one depth of the backbone, in memory or, when large, on disk.

    Float32 in memory up to a limit; above it, half precision in an unnamed temporary file that is memory-mapped and
    gone when the store or the process is (``TMPDIR`` says where).

    Args:
        views: K, augmented views of every sample.
        samples: N.
        shape: of one activation, for a ViT [tokens, D].
        memory_mb: limit in MiB of float32.
    """

    def __init__(self, views: int, samples: int, shape: Sequence[int], memory_mb: float) -> None:
        self._data: npt.NDArray[Any]
        self.on_disk = 4 * views * samples * int(np.prod(shape)) > memory_mb * 2**20
        if self.on_disk:
            self._file = tempfile.TemporaryFile(prefix="cl-adapters-")  # noqa: SIM115  # lives as long as the store
            self._data = np.memmap(self._file, np.float16, "w+", shape=(views, samples, *shape))
        else:
            self._data = np.empty((views, samples, *shape), np.float32)

    def write(self, view: int, start: int, h_BX: Tensor) -> None:
        """Put B consecutive samples of one view in their place.

        Raises:
            ClAdaptersError: a number too large for half precision.
        """
        if self.on_disk and bool((h_BX.abs() > torch.finfo(torch.float16).max).any()):  # NaN: no token there
            raise ClAdaptersError(
                "activations are too large for half precision: raise cache_memory_mb so that they fit into memory"
            )
        self._data[view, start : start + len(h_BX)] = h_BX.float().cpu().numpy()

    def read(self, views_B: Tensor, samples_B: Tensor) -> Tensor:
        """Float32 [B, ...] on the CPU."""
        return torch.from_numpy(np.asarray(self._data[views_B.numpy(), samples_B.numpy()], np.float32))
