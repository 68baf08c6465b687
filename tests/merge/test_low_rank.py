"""Low-rank adapters are merged by what they add to a weight matrix, and what the rank costs is reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import Route
from cl_adapters.errors import ClAdaptersError, ConfigError, UnknownName
from cl_adapters.merge import merge_adapters, merges
from cl_adapters.merge.low_rank import truncate_matrix, truncate_product
from cl_adapters.sites.sites import Site, Tap

SITES = ("blocks.0.key", "blocks.0.value", "blocks.1.key")
WIDTH, OUT = 12, 9
Named = dict[str, Tensor]


def drawn(seed: int, rank: int = 3, sites: tuple[str, ...] = SITES, scale: float | None = None) -> Named:
    """Tensors of a LoRA at matrices 9 x 12; with a scale, a learned one."""
    generator = torch.Generator().manual_seed(seed)
    found: Named = {}
    for site in sites:
        found[f"{site}/A"] = torch.randn(rank, WIDTH, generator=generator)
        found[f"{site}/B"] = torch.randn(OUT, rank, generator=generator)
        if scale is not None:
            found[f"{site}/scale"] = torch.tensor([scale])
    return found


def delta(tensors: Mapping[str, Tensor], site: str, scale: float = 1.0) -> Tensor:
    """dW in float64 by the definition."""
    learned = tensors.get(f"{site}/scale")
    scale = scale if learned is None else float(learned)
    return scale * tensors[f"{site}/B"].double() @ tensors[f"{site}/A"].double()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("adapter", [LoRA(rank=3, scale=0.3), LoRA(rank=3, scale=0.3, learn_scale=True)])
def test_factors_are_what_the_adapter_computes(adapter: LoRA) -> None:
    here = Tap("here", "out")
    shapes = adapter.shapes(Site("here", 0, "key", WIDTH, here, here, out_width=OUT))
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(2, 5, WIDTH, generator=generator)
    a_RD, b_OR = adapter.delta_factors(params)
    assert torch.allclose(adapter.apply(x, params), x @ (b_OR @ a_RD).T, atol=1e-5)
    again, back = adapter.from_factors(a_RD, b_OR)
    assert again == adapter
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in params.items()}
    assert torch.allclose(again.apply(x, back), adapter.apply(x, params), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_truncation_is_the_best_one_and_tells_its_error(rank: int) -> None:
    """Eckart-Young: against the SVD of the formed matrix, also where the rank exceeds the matrix."""
    generator = torch.Generator().manual_seed(0)
    a_RD, b_OR = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 12), (9, 30)))
    matrix = b_OR @ a_RD
    values = torch.linalg.svdvals(matrix)
    for found in (truncate_product(a_RD, b_OR, rank), truncate_matrix(matrix, rank)):
        assert found.a_RD.shape == (rank, 12)
        assert found.b_OR.shape == (9, rank)
        assert found.norm == pytest.approx(float(matrix.norm()), rel=1e-12)
        assert found.lost == pytest.approx(float(values[rank:].norm()), rel=1e-9, abs=1e-12)
        assert float((found.b_OR @ found.a_RD - matrix).norm()) == pytest.approx(found.lost, rel=1e-9, abs=1e-9)
        assert torch.allclose(found.a_RD @ found.a_RD.T, found.b_OR.T @ found.b_OR, atol=1e-9), "balanced"


def test_mean_at_full_rank_is_exact_and_the_mean_of_the_factors_is_not() -> None:
    both = [drawn(0), drawn(1)]
    merged = merge_adapters(both, LoRA(rank=3), "mean", rank=6)
    assert merged.adapter == LoRA(rank=6)
    assert merged.report.error < 1e-7
    for site in SITES:
        exact = (delta(both[0], site) + delta(both[1], site)) / 2
        assert distance(delta(merged.tensors, site), exact) < 1e-6
        apart = {key: (both[0][key] + both[1][key]) / 2 for key in both[0]}
        assert distance(delta(apart, site), exact) > 0.5, "A and B averaged apart: cross terms"


def test_at_the_same_rank_the_reported_error_is_the_measured_one() -> None:
    both = [drawn(0), drawn(1)]
    merged = merge_adapters(both, LoRA(rank=3), "mean")
    assert merged.adapter == LoRA(rank=3)
    lost = size = 0.0
    for site in SITES:
        exact = (delta(both[0], site) + delta(both[1], site)) / 2
        assert merged.report.errors[site] == pytest.approx(distance(delta(merged.tensors, site), exact), rel=1e-4)
        lost += float((delta(merged.tensors, site) - exact).norm() ** 2)
        size += float(exact.norm() ** 2)
    assert merged.report.error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert merged.report.error > 0.2, "unrelated adapters lose much at the rank of one"
    plain = merged.report.to_plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["space"] == "delta"
    assert plain["rank"] == 3


@pytest.mark.parametrize("method", ["mean", "weighted", "ema"])
def test_twins_merge_to_themselves(method: str) -> None:
    merged = merge_adapters([drawn(0), drawn(0)], LoRA(rank=3, scale=0.5), method)
    assert merged.report.error < 1e-7
    assert all(distance(delta(merged.tensors, site, 0.5), delta(drawn(0), site, 0.5)) < 1e-6 for site in SITES)


def test_the_order_does_not_matter_and_one_is_itself() -> None:
    three = [drawn(seed) for seed in range(3)]
    one, other = (merge_adapters(order, LoRA(rank=3), "mean") for order in (three, three[::-1]))
    alone = merge_adapters(three[:1], LoRA(rank=3), "task_arithmetic", {"scale": -1.0})
    for site in SITES:
        assert torch.allclose(delta(one.tensors, site), delta(other.tensors, site), atol=1e-5)
        assert distance(delta(alone.tensors, site), -delta(three[0], site)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}])
def test_task_arithmetic_on_a_base(options: dict[str, float]) -> None:
    """Also the linear methods see the base, by its coefficient."""
    two, base = [drawn(0), drawn(1)], drawn(2)
    merged = merge_adapters(two, LoRA(rank=3), "task_arithmetic", options, base=base, rank=9)
    scale = options.get("scale", 0.4)
    for site in SITES:
        start = delta(base, site)
        exact = start + scale * sum(delta(one, site) - start for one in two)
        assert distance(delta(merged.tensors, site), exact) < 1e-6
    assert merged.report.count == 2


def test_ema_towards_an_anchor() -> None:
    merged = merge_adapters([drawn(0), drawn(1)], LoRA(rank=3), "ema", {"momentum": 0.1, "steps": 3}, rank=6)
    for site in SITES:
        exact = delta(drawn(1), site) + 0.9**3 * (delta(drawn(0), site) - delta(drawn(1), site))
        assert distance(delta(merged.tensors, site), exact) < 1e-6


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, "cannot merge 3 adapters: it takes two, an adapter and its anchor"),
        (2, {"momentum": 7}, r"momentum must be in \[0, 1\]"),
        (2, {"momentum": float("nan")}, r"momentum must be in \[0, 1\]"),
        (2, {"steps": -1}, "steps at least 0"),
    ],
)
def test_ema_refusals(count: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_adapters([drawn(seed) for seed in range(count)], LoRA(rank=3), "ema", options)


@pytest.mark.parametrize(
    ("method", "options"),
    [("task_arithmetic", {"scale": float("nan")}), ("dare", {"scale": float("inf")})],
)
def test_options_that_give_no_numbers(method: str, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="gives numbers that are not finite"):
        merge_adapters([drawn(0), drawn(1)], LoRA(rank=3), method, options)


def test_ranks_scales_and_sites_may_differ() -> None:
    """Where an adapter has no site it changes nothing, so it counts as 0 in the mean."""
    some = SITES[1:]
    types = [LoRA(rank=3, scale=2.0), LoRA(rank=2, learn_scale=True)]
    merged = merge_adapters([drawn(0), drawn(1, 2, some, scale=0.3)], types, "mean", rank=5)
    for site in SITES:
        exact = delta(drawn(0), site, 2.0)
        if site in some:
            exact = exact + delta(drawn(1, 2, some, scale=0.3), site)
        assert distance(delta(merged.tensors, site, 2.0), exact / 2) < 1e-6
    assert merged.adapter == LoRA(rank=5, scale=2.0)
    assert merge_adapters([drawn(0), drawn(1, 2)], [LoRA(rank=3), LoRA(rank=2)], "mean").adapter.rank == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", sorted(set(merges.names()) - {"ema", "mean", "task_arithmetic", "weighted"}))
def test_other_methods_are_applied_to_the_matrices(method: str) -> None:
    both = [drawn(0), drawn(1)]
    options: dict[str, Any] = {"drop": 0.0} if method == "dare" else {"density": 0.3}
    merged = merge_adapters(both, LoRA(rank=3), method, options, rank=9)
    for site in SITES:
        exact = merges.get(method)([delta(one, site) for one in both], **options)
        assert distance(delta(merged.tensors, site), exact) < 1e-6
    assert merged.report.space == "delta"


def test_a_seed_gives_other_draws_at_every_site() -> None:
    same = {key: drawn(0, 3, ("x",))[f"x/{key[-1]}"] for key in drawn(0)}  # the same matrix everywhere
    first, again, other = (
        merge_adapters([same], LoRA(rank=3), "dare", {"seed": seed}, rank=9).tensors for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert distance(delta(first, SITES[0]), delta(first, SITES[1])) > 0.1
    assert distance(delta(first, SITES[0]), delta(other, SITES[0])) > 0.1


def test_the_merged_adapter_works_in_a_bank(tiny_vit: Callable[..., nn.Module]) -> None:
    """The mean of two LoRAs is the mean of what they add to the projections: features of a hand-changed model."""
    backbone = FrozenBackbone.wrap(tiny_vit(depth=1))
    bank = AdapterBank(backbone, LoRA(rank=2))
    generator = torch.Generator().manual_seed(0)
    two = [{k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in bank.fresh(generator).items()} for _ in "ab"]
    merged = merge_adapters(two, LoRA(rank=2), "mean", rank=4)
    larger = AdapterBank(backbone, merged.adapter)
    slot = larger.add_slot(merged.tensors)
    changed = tiny_vit(depth=1)
    weight = changed.get_parameter("blocks.0.attn.qkv.weight")
    with torch.no_grad():
        for third, kind in ((1, "key"), (2, "value")):
            for one in two:
                weight[32 * third : 32 * (third + 1)] += delta(one, f"blocks.0.{kind}").float() / 2
    x = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad(), larger.route(Route.single(slot)):
        features = backbone(x)
    assert torch.allclose(features, FrozenBackbone.wrap(changed)(x), atol=1e-5)


# --- types without a delta -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bottleneck", "prefix", "conv_bottleneck"])
def test_types_without_a_delta_merge_only_within_a_lineage(name: str) -> None:
    adapter: AdapterType = adapter_from(name)
    generator = torch.Generator().manual_seed(0)
    two = [{f"blocks.0.x/{key}": torch.randn(3, 2, generator=generator) for key in ("a", "b")} for _ in range(2)]
    with pytest.raises(ConfigError, match=rf"'{name}' are no linear maps.*lineage=True.*'lora'"):
        merge_adapters(two, adapter, "mean")
    merged = merge_adapters(two, adapter, "mean", lineage=True)
    assert all(torch.equal(merged.tensors[key], (two[0][key] + two[1][key]) / 2) for key in two[0])
    assert (merged.adapter, merged.report.space, merged.report.rank) == (adapter, "tensors", None)
    on_base = merge_adapters(two, adapter, "task_arithmetic", {"scale": 0.5}, base=two[0], lineage=True)
    assert all(torch.allclose(on_base.tensors[key], (two[0][key] + two[1][key]) / 2) for key in two[0])


def test_what_does_not_fit_together() -> None:
    lora, two = LoRA(rank=3), [drawn(0), drawn(1)]
    plain = {"blocks.0.x/a": torch.ones(2)}
    with pytest.raises(UnknownName, match="did you mean 'ties'"):
        merge_adapters(two, lora, "tie")
    with pytest.raises(ConfigError, match=r"no option 'densty'; did you mean 'density'\? It has: density, scale"):
        merge_adapters(two, lora, "ties", {"densty": 0.1})
    with pytest.raises(ConfigError, match="'mean' takes no base"):
        merge_adapters(two, lora, "mean", base=drawn(2))
    with pytest.raises(ConfigError, match="'ema' cannot merge 3 adapters"):
        merge_adapters([*two, drawn(2)], lora, "ema")
    with pytest.raises(ConfigError, match=r"density must be in \(0, 1\], got 0"):
        merge_adapters(two, lora, "ties", {"density": 0})
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        merge_adapters(two, lora, "mean", rank=0)
    with pytest.raises(ConfigError, match="scale 0"):
        merge_adapters(two, LoRA(rank=3, scale=0.0), "mean")
    with pytest.raises(ConfigError, match="'bottleneck' have no rank"):
        merge_adapters([plain], adapter_from("bottleneck"), "mean", rank=2)
    with pytest.raises(ClAdaptersError, match=r"different backbones.*blocks.0.key.*\[\(9, 12\), \(9, 13\)\]"):
        merge_adapters([drawn(0), drawn(0) | {"blocks.0.key/A": torch.ones(3, 13)}], lora, "mean")
    with pytest.raises(ClAdaptersError, match=r"differ at 1; first 'blocks.0.x/a': \(2,\) and \(3,\)"):
        merge_adapters([plain, {"blocks.0.x/a": torch.ones(3)}], adapter_from("bottleneck"), "mean", lineage=True)
    types = [adapter_from("bottleneck"), adapter_from("prefix")]
    with pytest.raises(ClAdaptersError, match="different types"):
        merge_adapters([plain, plain], types, "mean", lineage=True)
    with pytest.raises(ClAdaptersError, match="got 0 and 0 types"):
        merge_adapters([], lora, "mean")
