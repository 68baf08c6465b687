"""The order in which samples are read: plain, or by length where samples have one (texts), so that little is padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from cl_adapters.errors import ConfigError, suggestion

LOADER_OPTIONS = ("drop_last", "num_workers", "persistent_workers", "pin_memory", "shuffle")
"""Of ``train`` and ``eval``, as in Avalanche."""

WINDOW = 32
"""Batches that are sorted by length together: more waste less padding, but mix the samples less."""

Draw = Callable[[], torch.Generator]
"""Gives the generator of the next pass."""


def lengths_of(dataset: Any) -> Tensor | None:
    """Tokens of each sample, int64 [N], where the data set has ``lengths``; images have none."""
    found = getattr(dataset, "lengths", None)
    return None if found is None else torch.tensor([int(length) for length in found])


def length_batches(
    lengths_N: Tensor, batch: int, generator: torch.Generator, *, drop_last: bool = False, window: int = WINDOW
) -> list[Tensor]:
    """Random batches of samples of similar length.

    A permutation is cut into windows of ``window`` batches, each window is sorted by length (equal lengths stay in
    the order of the permutation) and cut into batches, and the order of all batches is drawn again.

    Args:
        lengths_N: int, tokens per sample.
        batch: samples per batch.
        generator: of the permutation, then of the order of the batches.
        drop_last: leave out the end of the permutation that fills no batch.
        window: batches per window.

    Returns:
        Rows of each batch, int64; every sample is in one of them.
    """
    order_N = torch.randperm(len(lengths_N), generator=generator)
    if drop_last and len(order_N) >= batch:  # before sorting: what is left out must not be the longest
        order_N = order_N[: len(order_N) // batch * batch]
    batches = [
        part
        for rows in order_N.split(window * batch)
        for part in rows[lengths_N[rows].argsort(stable=True)].split(batch)
    ]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


class ExplicitOrder(Sampler[int]):
    """A new permutation of N samples for each pass."""

    def __init__(self, samples: int, draw: Draw) -> None:
        self._samples = samples
        self._draw = draw

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._samples, generator=self._draw()).tolist()


class LengthBatches(Sampler[list[int]]):
    """New :func:`length_batches` for each pass."""

    def __init__(self, lengths_N: Tensor, batch: int, draw: Draw, drop_last: bool = False) -> None:
        self._lengths_N = lengths_N
        self._batch = batch
        self._draw = draw
        self._drop_last = drop_last

    def __len__(self) -> int:
        whole = self._drop_last and len(self._lengths_N) >= self._batch
        return (math.floor if whole else math.ceil)(len(self._lengths_N) / self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        batches = length_batches(self._lengths_N, self._batch, self._draw(), drop_last=self._drop_last)
        yield from (rows.tolist() for rows in batches)


def check_loader_options(given: Mapping[str, Any], owner: str) -> None:
    """Check the keywords that ``owner``, a method of a strategy, hands on to its loaders.

    Raises:
        ConfigError: an unknown one, by name.
    """
    for name in given:
        if name not in LOADER_OPTIONS:
            why = " A collate_fn is the data set's own matter." if name == "collate_fn" else ""
            raise ConfigError(
                f"unknown keyword {name} of {owner}{suggestion(name, LOADER_OPTIONS)}{why} It hands on to its loaders: "
                f"{', '.join(LOADER_OPTIONS)}"
            )


def reading_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the loader options that say how samples are read and change nothing of what comes out."""
    given = given or {}
    workers = given.get("num_workers", 0)
    return {
        "num_workers": workers,
        "pin_memory": bool(given.get("pin_memory")),
        "persistent_workers": workers > 0 and bool(given.get("persistent_workers")),
    }


def collate_of(dataset: Any) -> Callable[[list[Any]], Any] | None:
    """What a data set of Avalanche makes batches with; None: what torch does."""
    found: Callable[[list[Any]], Any] | None = getattr(dataset, "collate_fn", None)
    return found


def training_loader(dataset: Any, batch: int, draw: Draw, options: Mapping[str, Any]) -> DataLoader[Any]:
    """A loader in an order of its own for each pass: of similar length per batch where samples have ``lengths``.

    Of the loader ``options``, ``shuffle=False`` keeps the order of the data set, and ``drop_last`` leaves out an
    incomplete batch, unless it is the only one.
    """
    reading = reading_options(options) | {"collate_fn": collate_of(dataset)}
    drop_last = bool(options.get("drop_last"))
    shuffle, lengths_N = options.get("shuffle", True), lengths_of(dataset)
    if shuffle and lengths_N is not None:
        return DataLoader(dataset, batch_sampler=LengthBatches(lengths_N, batch, draw, drop_last), **reading)
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=ExplicitOrder(len(dataset), draw) if shuffle else None,
        drop_last=drop_last and len(dataset) >= batch,
        **reading,
    )


class Persistent:
    """A shuffling loader of torch or Avalanche whose workers persist, in the order that it has without them.

    For new workers torch draws a seed before each pass, from the generator that shuffles too. For workers that persist
    it does so once, and every later pass would come in another order.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._passes:
            torch.empty((), dtype=torch.int64).random_()
        self._passes += 1
        return iter(self._loader)


def reading_loader(
    dataset: Any, batch: int, options: Mapping[str, Any] | None = None
) -> tuple[DataLoader[Any], Tensor]:
    """A loader that runs through a data set once, the longest samples first where they have ``lengths``.

    ``options`` are those of :func:`reading_options`.

    Returns:
        The loader, and ``back_N`` (int64 [N]): what was computed in the loader's order, indexed with it, is in the
        order of the data set.
    """
    lengths_N = lengths_of(dataset)
    order_N = torch.arange(len(dataset))
    if lengths_N is not None:
        order_N = lengths_N.argsort(descending=True, stable=True)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=batch, sampler=order_N.tolist(), collate_fn=collate_of(dataset), **reading_options(options)
    )
    return loader, order_N.argsort()
