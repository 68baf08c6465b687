"""What every registered adapter type keeps, in every choice of its options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType, adapter_from, adapter_to_plain
from cl_adapters.bank.bank import sites_of
from cl_adapters.errors import ConfigError, IncompatibleBackbone, UnknownName
from cl_adapters.sites.sites import Site, Tap

WIDTH = 12


def site_of(adapter: AdapterType, width: int = WIDTH) -> Site:
    """A site of the first kind that the type takes; inside the attention the source is [q | k | v]."""
    kind, here = adapter.site_kinds[0], Tap("here", "out")
    inside = kind == "attention"
    return Site("here", 0, kind, 3 * width if inside else width, here, here, out_width=width, heads=4 * inside)


def applied(adapter: AdapterType, *args: Any) -> Tensor:
    """What the type at work at that site puts out."""
    return adapter.at(site_of(adapter)).apply(*args)


def drawn(adapter: AdapterType, seed: int, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in adapter.shapes(site_of(adapter)).items()}


def inputs(adapter: AdapterType, batch: int = 3, seed: int = 0) -> Tensor:
    """What the type reads at its site, in the layout that it wants."""
    shape = (batch, 5, site_of(adapter).width) if adapter.layout == "tokens" else (batch, WIDTH, 3, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def readout_of(adapter: AdapterType, batch: int = 3) -> Tensor:
    """A tensor of the shape of the type's output."""
    shape = (batch, 5, WIDTH) if adapter.layout == "tokens" else (batch, WIDTH, 3, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_is_a_frozen_keyword_only_dataclass_with_a_summary(adapter: AdapterType) -> None:
    cls: Any = type(adapter)
    assert vars(cls)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.__doc__
    assert cls.summary
    assert "\n" not in cls.summary


def test_survives_json(adapter: AdapterType) -> None:
    plain = adapter_to_plain(adapter)
    assert plain["type"] == adapters.name_of(adapter)
    assert adapter_from(plain) == adapter
    assert hash(adapter_from(plain)) == hash(adapter), "a frozen value, without tensors"


def test_unknown_option_and_type_get_a_suggestion(adapter: AdapterType) -> None:
    name = adapters.name_of(adapter)
    option = dataclasses.fields(adapter)[0].name  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"unknown option adapter.{option}x; did you mean '{option}'"):
        adapter_from({"type": name, f"{option}x": 1})
    with pytest.raises(UnknownName, match=f"unknown adapter type '{name}s'; did you mean '{name}'"):
        adapter_from(f"{name}s")


def test_shapes_and_fresh_tensors_agree(adapter: AdapterType) -> None:
    for width in (8, WIDTH):
        site = site_of(adapter, width)
        params = adapter.init(site, torch.Generator().manual_seed(0))
        assert {name: tuple(value.shape) for name, value in params.items()} == adapter.shapes(site)
        assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in params.values())
        assert all(value.isfinite().all() for value in params.values())
        assert adapter.num_parameters(site) == sum(value.numel() for value in params.values())


def test_initialisation_is_a_function_of_the_generator(adapter: AdapterType) -> None:
    before = torch.get_rng_state()
    first, again = (adapter.init(site_of(adapter), torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the global generator"


def test_starts_as_the_identity(adapter: AdapterType) -> None:
    """Bit for bit, or the type says that it does not; and then it does not."""
    delta = applied(adapter, inputs(adapter), adapter.init(site_of(adapter), torch.Generator().manual_seed(0)))
    assert delta.isfinite().all()
    assert torch.equal(delta, torch.zeros_like(delta)) == adapter.starts_as_identity


def test_which_defaults_do_not_start_as_the_identity() -> None:
    """Written down here, so that none gets a new initialisation unseen: the tokens attend to any prefix."""
    assert [name for name in adapters.names() if not adapter_from(name).starts_as_identity] == ["prefix"]


def test_output_has_the_shape_of_the_input_and_nothing_is_written(adapter: AdapterType) -> None:
    x, params = inputs(adapter), drawn(adapter, 0)
    kept = x.clone(), {name: value.clone() for name, value in params.items()}
    delta = applied(adapter, x, params)
    assert delta.shape == readout_of(adapter).shape
    assert delta.isfinite().all()
    assert delta.abs().max() > 0
    assert torch.equal(x, kept[0])
    assert all(torch.equal(params[name], kept[1][name]) for name in params)
    assert torch.equal(applied(adapter, x, params), delta)


@pytest.mark.parametrize("batch", [1, 3, WIDTH])
def test_one_adapter_per_sample_equals_one_by_one(adapter: AdapterType, batch: int) -> None:
    """Also where the batch is as large as the width, so that a wrong broadcast would go unseen by its shape."""
    x = inputs(adapter, batch)
    own = [drawn(adapter, seed) for seed in range(batch)]
    gathered = {name: torch.stack([params[name] for params in own]) for name in own[0]}
    mixed = applied(adapter, x, gathered)
    single = torch.cat([applied(adapter, x[i : i + 1], params) for i, params in enumerate(own)])
    assert (mixed - single).abs().max() <= 1e-5 * (1 + single.abs().max())


def test_samples_do_not_see_each_other(adapter: AdapterType) -> None:
    x, params = inputs(adapter, 4), drawn(adapter, 0)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(applied(adapter, x[order], params), applied(adapter, x, params)[order], atol=1e-5)
    assert torch.allclose(applied(adapter, x[:1], params), applied(adapter, x, params)[:1], atol=1e-5)


def test_gradients_reach_every_tensor_and_agree_per_sample(adapter: AdapterType) -> None:
    x, readout = inputs(adapter).requires_grad_(), readout_of(adapter)
    params = {name: value.requires_grad_() for name, value in drawn(adapter, 0).items()}
    (applied(adapter, x, params) * readout).sum().backward()
    assert x.grad is None or x.grad.isfinite().all()  # None: a type may add the same to every token
    own = {n: v.detach().expand(3, *v.shape).clone().requires_grad_() for n, v in params.items()}
    (applied(adapter, x, own) * readout).sum().backward()
    shared = {name: value.grad for name, value in params.items() if value.grad is not None}
    assert shared.keys() == params.keys()
    largest = max(float(gradient.abs().max()) for gradient in shared.values())
    for name, gradient in shared.items():
        assert gradient.any(), name
        per_sample = own[name].grad
        assert per_sample is not None
        assert (per_sample.sum(0) - gradient).abs().max() < 1e-5 * largest, name


def test_noise_only_from_the_given_generator(adapter: AdapterType) -> None:
    before = torch.get_rng_state()
    x, params = inputs(adapter), drawn(adapter, 0)
    still = applied(adapter, x, params)
    first, again, other = (applied(adapter, x, params, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    rate = getattr(adapter, "dropout", 0)
    if rate:
        assert not torch.equal(first, still)
        assert not torch.equal(first, other)
        without: AdapterType = dataclasses.replace(adapter, dropout=0.0)  # type: ignore[type-var]
        assert torch.equal(applied(without, x, params, torch.Generator().manual_seed(1)), still)
    else:
        assert torch.equal(first, still)


def test_attaches_once_per_block_and_kind(adapter: AdapterType, home: Any) -> None:
    sites = sites_of(home.backbone, adapter)
    assert len(sites) == home.backbone.depth * len(adapter.site_kinds)
    assert len({site.name for site in sites}) == len(sites)


@pytest.mark.parametrize(
    ("type_name", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("lora", {"targets": []}, "at least one"),
        ("lora", {"targets": ["key", "key"]}, "each projection once"),
        ("lora", {"targets": ["qkv"]}, "targets"),
        ("lora", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("prefix", {"length": 0}, "length must be at least 1, got 0"),
        ("conv_bottleneck", {"kernel": 2}, "kernel must be odd"),
        ("conv_bottleneck", {"kernel": -1}, "kernel must be at least 1"),
        ("conv_bottleneck", {"bottleneck": 0}, "bottleneck must be at least 1"),
        ("bottleneck", {"bottleneck": 0}, "bottleneck must be at least 1"),
        ("bottleneck", {"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ("ln_tuning", {"place": "head"}, "place.*'both', 'attn' or 'ffn', got 'head'"),
        ("pair", {"second": "lora"}, "different kinds of sites, got key twice"),
        ("pair", {"first": {"type": "lora", "rank": 0}}, "rank must be at least 1, got 0"),
        ("pair", {"second": "ln_tunings"}, "did you mean 'ln_tuning'"),
    ],
)
def test_options_out_of_range(type_name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_from({"type": type_name, **options})


def test_prefix_needs_the_number_of_heads() -> None:
    here = Tap("here", "out")
    for heads in (0, 5):
        with pytest.raises(IncompatibleBackbone, match=r"Site\.heads.*got"):
            adapter_from("prefix").shapes(Site("here", 0, "attention", 36, here, here, out_width=12, heads=heads))


@pytest.mark.parametrize("options", [{}, {"compensate": False}, {"learn_scale": False}])
def test_prefix_reads_queries_and_their_mass_as_well(options: dict[str, Any]) -> None:
    """What attentions of transformers tell gives what queries, keys and values give, also one prefix per sample."""
    prefix = adapter_from({"type": "prefix", **options})
    x = inputs(prefix)
    q, k, v = x.unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
    q = q * 3**-0.5
    logits = q @ k.mT
    read = torch.cat([q.transpose(1, 2).flatten(2), logits.logsumexp(-1).mT], -1)
    heads = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    own = [drawn(prefix, seed) for seed in range(3)]
    gathered = {name: torch.stack([params[name] for params in own]) for name in own[0]}
    for params in (own[0], gathered):
        assert torch.allclose(prefix.apply(read, params, None, heads), prefix.apply(x, params), atol=1e-5)


def test_dropout_keeps_the_expectation() -> None:
    """Inverted dropout at the given rate: the mean over many masks is the output without noise."""
    from cl_adapters.adapters.bottleneck import Bottleneck

    adapter = Bottleneck(dropout=0.3, bottleneck=1, scale=1.0, activation="relu")
    params = {"down": torch.ones(1, 1), "down_bias": torch.zeros(1), "up": torch.ones(1, 1), "up_bias": torch.zeros(1)}
    out = adapter.apply(torch.ones(1, 20_000, 1), params, torch.Generator().manual_seed(0))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
