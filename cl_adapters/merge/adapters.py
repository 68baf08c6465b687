"""Merging whole adapters: low-rank types exactly, by what they add to a matrix; others number by number.

The latter only within one lineage, unless equal positions mean the same in all adapters of the type.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cl_adapters._seeding import derive
from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.errors import ClAdaptersError, ConfigError, suggestion
from cl_adapters.merge.base import is_linear, merges
from cl_adapters.merge.low_rank import Truncated, truncate_matrix, truncate_product

Named = Mapping[str, Tensor]
"""An adapter's tensors, keyed "blocks.3.key/A"."""
Factors = tuple[Tensor, Tensor]
"""A [R, D] and B [O, R] of one site, dW = B A."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """How adapters were merged, and what that cost.

    Attributes:
        method: name of the merge method.
        options: its options that were given.
        count: T, merged adapters.
        space: "delta": merged as changes of weight matrices; "tensors": number by number.
        rank: of the result; None: the type has none.
        error: Frobenius norm of what the truncation to that rank lost, over that of the merged change, all sites
            together; 0 where nothing was truncated.
        errors: the same for each site.
    """

    method: str
    options: Mapping[str, Any]
    count: int
    space: Literal["delta", "tensors"]
    rank: int | None = None
    error: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready values, without the errors of the single sites."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "count": self.count,
            "space": self.space,
            "rank": self.rank,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """The result of :func:`merge_adapters`.

    Attributes:
        adapter: the type of the result; the first one's, at the report's rank.
        tensors: float32, keyed as the inputs.
        report: how it came about.
    """

    adapter: AdapterType
    tensors: dict[str, Tensor]
    report: MergeReport


def merge_adapters(
    tensors: Sequence[Named],
    adapter: AdapterType | Sequence[AdapterType],
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    base: Named | None = None,
    rank: int | None = None,
    lineage: bool = False,
) -> MergedAdapter:
    """Merge adapters into one.

    Types with a delta (``AdapterType.delta_factors``) are merged as changes of weight matrices and factorised back, so
    their ranks and sites may differ; where an adapter has no site, it adds 0. Linear methods work on the factors (QR
    and a small SVD), others on the matrices.

    Args:
        tensors: of each adapter, as from ``AdapterBank.export``.
        adapter: their type, or one per adapter.
        method: name of a merge method.
        options: its options; a ``seed`` gives other draws at every site.
        base: the adapter that they were all trained from, of the (first) type; None: none.
        rank: of the result, for types with a delta; default the largest of the inputs. Their sum loses nothing with
            linear methods.
        lineage: the adapters were trained one from the other (or all from one), so that equal positions mean the same.
            Types without a delta need that, but for those that are ``aligned``.

    Raises:
        UnknownName: no such method.
        ConfigError: options, base or rank that do not go with method and type, or a type without a delta outside of a
            lineage.
        ClAdaptersError: adapters that do not fit together.
    """
    types = [adapter] * len(tensors) if isinstance(adapter, AdapterType) else list(adapter)
    if not tensors or len(types) != len(tensors):
        raise ClAdaptersError(f"merging needs adapters and a type for each, got {len(tensors)} and {len(types)} types")
    call = _Call(method, dict(options or {}), base is not None)
    given = list(zip(types, tensors, strict=True)) + ([] if base is None else [(types[0], base)])
    factors = [factors_of(*one) for one in given]
    with_delta = [one for one in factors if one is not None]
    if len(with_delta) == len(factors):
        return _merge_deltas(with_delta, types[0], call, rank)
    if rank is not None:
        raise ConfigError(f"adapters of type {_name(types[0])!r} have no rank; leave rank out")
    apart = [one for (one, _), known in zip(given, factors, strict=True) if known is None and not one.aligned]
    if apart and not lineage:
        raise ConfigError(_no_lineage(apart[0]))
    if any(one != types[0] for one in types):
        raise ClAdaptersError(f"adapters of different types cannot be merged: {sorted({repr(one) for one in types})}")
    return _merge_numbers([one for _, one in given], types[0], call)


class _Call:
    """A merge method with its options, checked."""

    def __init__(self, name: str, options: dict[str, Any], with_base: bool) -> None:
        self.name, self.method, self.options, self.with_base = name, merges.get(name), options, with_base
        known = list(inspect.signature(self.method).parameters)[1:]
        for option in options:
            if option not in known or option == "base":
                raise ConfigError(
                    f"merge method {name!r} has no option {option!r}{suggestion(option, known)} It has: "
                    f"{', '.join(one for one in known if one != 'base') or 'none'}"
                )
        if with_base and "base" not in known:
            raise ConfigError(f"merge method {name!r} takes no base; leave it out")
        self.seeded = "seed" in known

    def __call__(self, tensors: list[Tensor], site: str = "") -> Tensor:
        """Merge tensors of one shape; the last one is the base, if there is one."""
        options = dict(self.options)
        if self.with_base:
            *tensors, options["base"] = tensors
        if self.seeded:
            options["seed"] = derive(options.get("seed", 0), "merge", site)
        try:
            merged = self.method(tensors, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"merge method {self.name!r} cannot merge {len(tensors)} adapters: {error}") from error
        if not merged.isfinite().all():
            raise ConfigError(f"merge method {self.name!r} with {self.options} gives numbers that are not finite")
        return merged


# --- in delta space ----------------------------------------------------------------------------------------------


def factors_of(adapter: AdapterType, tensors: Named) -> dict[str, Factors] | None:
    """A and B of every site; None: the type has no delta."""
    found = {}
    for site, params in _by_site(tensors):
        pair = adapter.delta_factors(params)
        if pair is None:
            return None
        found[site] = pair
    return found


def _merge_deltas(
    given: list[dict[str, Factors]], adapter: AdapterType, call: _Call, rank: int | None
) -> MergedAdapter:
    rank = max(len(a_RD) for one in given for a_RD, _ in one.values()) if rank is None else rank
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    coefficients = call(list(torch.eye(len(given), dtype=torch.float64))) if is_linear(call.method) else None
    merged: dict[str, Tensor] = {}
    results: dict[str, Truncated] = {}
    kind = adapter
    for site in dict.fromkeys(site for one in given for site in one):
        factors = _everywhere([one.get(site) for one in given], site)
        if coefficients is not None:
            a_RD = torch.cat([a_RD.double() for a_RD, _ in factors])
            parts = [b_OR * share for (_, b_OR), share in zip(factors, coefficients, strict=True)]
            results[site] = truncate_product(a_RD, torch.cat(parts, 1), rank)
        else:
            matrices = [b_OR.double() @ a_RD.double() for a_RD, b_OR in factors]
            results[site] = truncate_matrix(call(matrices, site), rank)
        kind, params = adapter.from_factors(results[site].a_RD.float(), results[site].b_OR.float())
        merged |= {f"{site}/{name}": value for name, value in params.items()}
    report = MergeReport(
        method=call.name,
        options=call.options,
        count=len(given) - call.with_base,
        space="delta",
        rank=rank,
        error=_ratio(results.values()),
        errors={site: _ratio([one]) for site, one in results.items()},
    )
    return MergedAdapter(adapter=kind, tensors=merged, report=report)


def _everywhere(factors: list[Factors | None], site: str) -> list[Factors]:
    """The factors of one site; those of an adapter that has none there have rank 0."""
    shapes = {(len(b_OR), a_RD.shape[1]) for a_RD, b_OR in filter(None, factors)}
    if len(shapes) > 1:
        raise ClAdaptersError(f"adapters of different backbones: at {site!r} they change matrices of {sorted(shapes)}")
    out, width = shapes.pop()
    return [(torch.zeros(0, width), torch.zeros(out, 0)) if one is None else one for one in factors]


def _ratio(results: Any) -> float:
    norm = math.sqrt(sum(one.norm**2 for one in results))
    return math.sqrt(sum(one.lost**2 for one in results)) / norm if norm else 0.0


# --- number by number --------------------------------------------------------------------------------------------


def _merge_numbers(given: list[Named], adapter: AdapterType, call: _Call) -> MergedAdapter:
    shapes = [{key: tuple(value.shape) for key, value in one.items()} for one in given]
    for other in shapes[1:]:
        wrong = sorted(key for key in shapes[0].keys() | other.keys() if shapes[0].get(key) != other.get(key))
        if wrong:
            raise ClAdaptersError(
                f"adapters of one lineage have the same tensors, but these differ at {len(wrong)}; first {wrong[0]!r}: "
                f"{shapes[0].get(wrong[0])} and {other.get(wrong[0])}"
            )
    merged = {key: call([one[key].float() for one in given], key) for key in given[0]}
    count = len(given) - call.with_base
    report = MergeReport(method=call.name, options=call.options, count=count, space="tensors")
    return MergedAdapter(adapter=adapter, tensors=merged, report=report)


def _by_site(tensors: Named) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each site, sites in order."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        site, _, name = key.rpartition("/")
        grouped.setdefault(site, {})[name] = value.detach()
    yield from grouped.items()


def _name(adapter: AdapterType) -> str:
    return adapters.name_of(adapter)


def _no_lineage(adapter: AdapterType) -> str:
    return (
        f"adapters of type {_name(adapter)!r} are no linear maps: trained apart, their hidden units stand in different "
        "orders, and an average of their tensors is the average of nothing. Pass lineage=True if each was trained from "
        "the one before (or all from one start, with a base); otherwise keep them apart and mix their outputs, or use "
        "a low-rank type such as 'lora'"
    )
