"""Features on demand: each (sample, adapter) pair goes through the backbone at most once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_adapters.bank import BARE, Route, Routes
from cl_adapters.batches import Inputs, batch_size, take

if TYPE_CHECKING:
    from cl_adapters.model import AdapterModel


class FeatureMemory:
    """Features of one data set under frozen adapters, kept by the caller between evaluations.

    Finished adapters never change, so a benchmark that evaluates the same images after every task need not
    compute the same features again. The memory belongs to whoever evaluates, never to the model.

    Args:
        model: whose features these are; the memory is void for any other.
    """

    def __init__(self, model: AdapterModel) -> None:
        self.model = model
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self, slot: int) -> None:
        """Drop the features under one adapter; needed after that adapter was changed."""
        self._kept = {key: value for key, value in self._kept.items() if key[1] != slot}

    def get(self, sample: int, slot: int) -> Tensor | None:
        """Feature [D] of that sample under that adapter, if known."""
        return self._kept.get((sample, slot))

    def put(self, sample: int, slot: int, f_D: Tensor) -> None:
        """Keep a feature."""
        self._kept[sample, slot] = f_D


class LazyFeatures:
    """The features of one batch under any adapter, computed when first asked for.

    Args:
        model: backbone and bank.
        x: B inputs on the model's device.
        memory: features known from earlier evaluations, with
        samples: the B sample numbers under which the memory knows this batch.

    Attributes:
        passes_B: int64 [B], distinct adapters asked for per sample: what a call without memory costs.
        computed: passes that were really run for this batch.
    """

    def __init__(
        self,
        model: AdapterModel,
        x: Inputs,
        memory: FeatureMemory | None = None,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.x = x
        self.batch = batch_size(x)
        self.passes_B = torch.zeros(self.batch, dtype=torch.long)
        self.computed = 0
        self._memory = memory
        self._samples = samples
        self._slots = max(model.num_slots, 1) + 1  # BARE takes the first place
        self._place = torch.full((self.batch * self._slots,), -1, dtype=torch.long)
        self._store: list[Tensor] = []
        self._stored = 0

    @property
    def rows(self) -> Tensor:
        """All rows of the batch, int64 [B]."""
        return torch.arange(self.batch)

    def under(self, slot: int) -> Tensor:
        """Features [B, D] of every row under one adapter (-1: the bare backbone)."""
        return self(self.rows, torch.full((self.batch,), slot))

    def mixed(self, routes: Routes) -> Tensor:
        """Features [B, D] of every row under one mapping of routes; one pass, never remembered."""
        self.passes_B += 1
        self.computed += self.batch
        return self.model.features(self.x, routes)

    def __call__(self, rows_M: Tensor, slots_M: Tensor) -> Tensor:
        """Features [M, D] of the given rows, each under its own adapter; one mixed backbone call at most."""
        keys_M = rows_M * self._slots + slots_M + 1
        fresh = keys_M[self._place[keys_M] < 0].unique() // self._slots
        self.passes_B.index_add_(0, fresh, torch.ones_like(fresh))
        if self._memory is not None:
            self._recall(keys_M)
        absent = keys_M[self._place[keys_M] < 0].unique()
        if len(absent):
            rows, slots = absent // self._slots, absent % self._slots - 1
            self._keep(absent, self._compute(rows, slots))
            self.computed += len(rows)
        return torch.cat(self._store)[self._place[keys_M].to(self.model.device)]

    def _compute(self, rows: Tensor, slots: Tensor) -> Tensor:
        device = self.model.device
        x = self.x if len(rows) == self.batch else take(self.x, rows.to(device))
        if bool((slots == BARE).all()):
            return self.model.features(x, None)
        return self.model.features(x, Route.hard(slots.to(device)))

    def _keep(self, keys: Tensor, f_MD: Tensor) -> None:
        self._place[keys] = torch.arange(self._stored, self._stored + len(keys))
        self._store.append(f_MD)
        self._stored += len(keys)
        if self._memory is not None and self._samples is not None:
            for key, f_D in zip(keys.tolist(), f_MD, strict=True):
                self._memory.put(self._samples[key // self._slots], key % self._slots - 1, f_D)

    def _recall(self, keys_M: Tensor) -> None:
        assert self._memory is not None and self._samples is not None
        known = [
            (key, self._memory.get(self._samples[key // self._slots], key % self._slots - 1))
            for key in keys_M[self._place[keys_M] < 0].unique().tolist()
        ]
        found = [(key, f_D) for key, f_D in known if f_D is not None]
        if found:
            self._place[torch.tensor([key for key, _ in found])] = torch.arange(self._stored, self._stored + len(found))
            self._store.append(torch.stack([f_D for _, f_D in found]))
            self._stored += len(found)
