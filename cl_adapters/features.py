"""Features on demand: each (sample, adapter) pair goes through the backbone at most once.

Where all adapters sit in late blocks, the blocks before them give the same for every adapter, and run once per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_adapters.backbones.inputs import Inputs, batch_size, take
from cl_adapters.bank.bank import BARE, Route, Routes
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone
from cl_adapters.model.encoder import AdaptedEncoder


class FeatureMemory:
    """Features of one data set under frozen adapters, kept by the caller between evaluations.

    Finished adapters never change, so a benchmark that evaluates the same images after every task need not
    compute the same features again. The memory belongs to whoever evaluates, never to the model.

    Args:
        model: whose features these are; the memory is void for any other.
    """

    def __init__(self, model: AdaptedEncoder) -> None:
        self.model = model
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def check(self, model: AdaptedEncoder, batch: int, samples: Sequence[int] | None) -> None:
        """Check that this memory is the model's, and that a batch has numbers.

        Raises:
            ClAdaptersError: one of them is not so.
        """
        if self.model.__dict__ is not model.__dict__:  # a strategy's model is another face of the same
            raise ClAdaptersError("this memory holds features of another model: make a FeatureMemory of this one")
        if samples is None or len(samples) != batch:
            given = "no sample numbers" if samples is None else f"{len(samples)} sample numbers"
            raise ClAdaptersError(f"a memory needs the number of every sample: {batch} inputs, but {given}")

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
        passes_B: float32 [B], backbone passes that a call without memory costs: 1 for the first adapter asked for, and
            for every further one the share of the blocks from the first that has adapters on.
        computed: passes that were really run for this batch.
    """

    def __init__(
        self,
        model: AdaptedEncoder,
        x: Inputs,
        memory: FeatureMemory | None = None,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.x = x
        self.batch = batch_size(x)
        self.passes_B = torch.zeros(self.batch)
        self.computed = 0.0
        self._memory = memory
        self._samples = samples
        self._slots = max(model.num_slots, 1) + 1  # BARE takes the first place
        self._place = torch.full((self.batch * self._slots,), -1, dtype=torch.long)
        self._store: list[Tensor] = []
        self._stored = 0
        self._asked_B = torch.zeros(self.batch, dtype=torch.bool)
        self._block, self._share = _late_blocks(model)
        self._entry_B = torch.full((self.batch,), -1, dtype=torch.long)
        self._entered: list[Tensor] = []

    @property
    def rows(self) -> Tensor:
        """All rows of the batch, int64 [B]."""
        return torch.arange(self.batch)

    def under(self, slot: int) -> Tensor:
        """Features [B, D] of every row under one adapter (-1: the bare backbone)."""
        return self(self.rows, torch.full((self.batch,), slot))

    def mixed(self, routes: Routes) -> Tensor:
        """Features [B, D] of every row under one mapping of routes; at most one pass, never remembered."""
        self._charge(self.rows)
        return self._run(self.rows, routes)

    def __call__(self, rows_M: Tensor, slots_M: Tensor) -> Tensor:
        """Features [M, D] of the given rows, each under its own adapter; one mixed backbone call at most.

        Raises:
            ClAdaptersError: an adapter that the model does not have.
        """
        absent_M = (slots_M < BARE) | (slots_M + 1 >= self._slots)
        if bool(absent_M.any()):
            raise ClAdaptersError(
                f"slot {int(slots_M[absent_M][0])} was asked for, but the model has {self.model.num_slots} adapters, "
                "counted from 0: take another predictor, or other slots in it"
            )
        keys_M = rows_M * self._slots + slots_M + 1
        self._charge(keys_M[self._place[keys_M] < 0].unique() // self._slots)
        if self._memory is not None:
            self._recall(keys_M)
        absent = keys_M[self._place[keys_M] < 0].unique()
        if len(absent):
            rows, slots = absent // self._slots, absent % self._slots - 1
            bare = bool((slots == BARE).all())
            self._keep(absent, self._run(rows, None if bare else Route.hard(slots.to(self.model.device))))
        return torch.cat(self._store)[self._place[keys_M].to(self.model.device)]

    def _charge(self, rows: Tensor) -> None:
        """Count what one more feature of each of these rows costs (rows may repeat)."""
        self.passes_B.index_add_(0, rows, torch.full((len(rows),), self._share))
        first = rows[~self._asked_B[rows]].unique()
        self.passes_B[first] += 1 - self._share
        self._asked_B[first] = True

    def _run(self, rows: Tensor, routes: Routes | None) -> Tensor:
        """Features of these rows: from the beginning, or where all adapters sit later from the first that has some."""
        self.computed += self._share * len(rows)
        if not self._block:
            return self.model.features(self._inputs(rows), routes)
        new = rows[self._entry_B[rows] < 0].unique()
        if len(new):
            known = sum(len(h) for h in self._entered)
            self._entered.append(self.model.features(self._inputs(new), None, stop=self._block))
            self._entry_B[new] = torch.arange(known, known + len(new))
            self.computed += (1 - self._share) * len(new)
        places = self._entry_B[rows].to(self.model.device)
        return self.model.features(torch.cat(self._entered)[places], routes, start=self._block)

    def _inputs(self, rows: Tensor) -> Inputs:
        whole = len(rows) == self.batch and torch.equal(rows, self.rows)
        return self.x if whole else take(self.x, rows.to(self.model.device))

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


def _late_blocks(model: AdaptedEncoder) -> tuple[int, float]:
    """The first block that has adapters, and the share of the blocks from there on.

    0 and 1.0 where that is the first one, or where the backbone cannot go on from a block.
    """
    first = 0 if model.bank is None else model.bank.blocks[0]
    if not first:
        return 0, 1.0
    try:
        model.backbone.check_resumable()
    except IncompatibleBackbone:
        return 0, 1.0
    return first, 1 - first / model.backbone.depth
