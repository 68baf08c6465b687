"""The adapter bank: mixed batches, soft mixtures, routes per site, copies, files in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import BARE, AdapterBank, Route
from cl_adapters.errors import ClAdaptersError, DataError

Filled = Callable[..., AdapterBank]
SMALL = Bottleneck(bottleneck=4)


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(
    bank: AdapterBank, backbone: FrozenBackbone, x: Any, route: Any, noise: torch.Generator | None = None
) -> Tensor:
    with bank.route(route, noise):
        return backbone.features(x)


# --- over all adapter types ---------------------------------------------------------------------------------


def test_mixed_batch_equals_one_by_one(adapter: AdapterType, home: Any, filled: Filled) -> None:
    bank, x = filled(home.backbone, adapter), home.inputs(5)
    ids = torch.tensor([2, 0, 1, 0, 2])
    mixed = run(bank, home.backbone, x, Route.hard(ids))
    for i, slot in enumerate(ids.tolist()):
        alone = run(bank, home.backbone, x[i : i + 1], Route.single(slot))
        assert (mixed[i] - alone[0]).abs().max() < 1e-5
    others = run(bank, home.backbone, x, Route.hard((ids + 1) % 3))
    assert (others - mixed).abs().amax(1).min() > 1e-4, "each adapter does something else"


def test_one_hot_soft_route_equals_the_hard_one(adapter: AdapterType, home: Any, filled: Filled) -> None:
    bank, x = filled(home.backbone, adapter), home.inputs(5)
    ids = torch.tensor([2, 0, 1, 0, 2])
    one_hot = torch.nn.functional.one_hot(ids, 3).float()
    hard = run(bank, home.backbone, x, Route.hard(ids))
    assert torch.allclose(run(bank, home.backbone, x, Route.soft(one_hot)), hard, atol=1e-5)


def test_fresh_slot_leaves_the_features_bit_for_bit(adapter: AdapterType, home: Any) -> None:
    """Also in a mixed batch; unless the type says that it does not start as the identity, and then it does not."""
    bank, x = AdapterBank(home.backbone, adapter), home.inputs(5)
    for seed in range(2):
        bank.add_slot(bank.fresh(torch.Generator().manual_seed(seed)))
    routed = [run(bank, home.backbone, x, r) for r in (Route.single(0), Route.hard(torch.tensor([0, 1, 0, 1, 1])))]
    plain = home.backbone.features(x)
    assert all(torch.equal(f, plain) == adapter.starts_as_identity for f in routed)


def test_export_and_add_slot_round_trip(adapter: AdapterType, home: Any, filled: Filled) -> None:
    bank, x = filled(home.backbone, adapter), home.inputs(5)
    exported = bank.export(1)
    assert all(key.startswith(("blocks.", "stages.", "encoder.layer.")) and "/" in key for key in exported), (
        "no adapter name in the keys"
    )
    slot = bank.add_slot(exported)
    assert slot == 3
    assert torch.equal(run(bank, home.backbone, x, Route.single(1)), run(bank, home.backbone, x, Route.single(3)))
    for tensor in exported.values():
        tensor.zero_()  # copies both ways: neither slot moves
    assert torch.equal(run(bank, home.backbone, x, Route.single(1)), run(bank, home.backbone, x, Route.single(3)))
    assert bank.slot_parameters(1)[0].any()


# --- routes -------------------------------------------------------------------------------------------------


def test_no_route_is_the_bare_backbone(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    plain = backbone.features(x)
    bank = filled(backbone, SMALL)
    assert torch.equal(backbone.features(x), plain)
    assert torch.equal(run(bank, backbone, x, None), plain)
    assert torch.equal(run(bank, backbone, x, {}), plain), "a route for no site"
    assert torch.equal(run(bank, backbone, x, Route.soft(torch.zeros(5, 3))), plain), "no weight anywhere"


def test_bare_samples_among_others(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    """-1 stands for no adapter, not for the last one."""
    plain = backbone.features(x)
    bank = filled(backbone, SMALL)
    assert torch.equal(run(bank, backbone, x, Route.single(BARE)), plain)
    assert torch.equal(run(bank, backbone, x, Route.hard(torch.full((5,), BARE))), plain)
    mixed = run(bank, backbone, x, Route.hard(torch.tensor([BARE, 2, BARE, 0, BARE])))
    assert torch.allclose(mixed[[0, 2, 4]], plain[[0, 2, 4]], atol=1e-6)
    for i, slot in ((1, 2), (3, 0)):
        assert torch.allclose(mixed[i], run(bank, backbone, x[i : i + 1], Route.single(slot))[0], atol=1e-5)


def test_slot_that_does_not_exist(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, SMALL)
    for route in (
        Route.single(3),
        Route.hard(torch.tensor([0, 1, 2, 3, 0])),
        Route.single(-2),
        Route.soft(torch.ones(5, 4)),
    ):
        with pytest.raises(ClAdaptersError, match=r"the bank has slots 0\.\.2"):
            run(bank, backbone, x, route)
    with pytest.raises(ClAdaptersError, match="the bank has no slot yet"):
        run(AdapterBank(backbone, SMALL), backbone, x, Route.single(0))


def test_route_of_another_batch_size(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, SMALL)
    for route in (Route.hard(torch.tensor([0, 1])), Route.soft(torch.ones(1, 3)), Route.soft(torch.ones(4, 3))):
        with pytest.raises(ClAdaptersError, match=r"the route has . samples, the batch has 5"):
            run(bank, backbone, x, route)
    assert torch.equal(run(bank, backbone, x, None), backbone.features(x)), "and the bank works on"


def test_routes_per_site(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    """One adapter in one block only, another in the next: as if the others were the identity."""
    bank = filled(backbone, SMALL)
    first, second, third = (site.name for site in bank.sites)
    some = run(bank, backbone, x, {first: Route.single(1), third: Route.hard(torch.tensor([0, 2, 0, 2, 0]))})
    tensors = [bank.export(slot) for slot in range(3)]
    zero = {key: torch.zeros_like(value) for key, value in tensors[0].items()}
    merged = [
        zero
        | {key: value for key, value in tensors[1].items() if key.startswith(first)}
        | {key: value for key, value in tensors[last].items() if key.startswith(third)}
        for last in (0, 2)
    ]
    slots = [bank.add_slot(part) for part in merged]
    wanted = run(bank, backbone, x, Route.hard(torch.tensor([slots[i] for i in (0, 1, 0, 1, 0)])))
    assert torch.allclose(some, wanted, atol=1e-5)
    with pytest.raises(ClAdaptersError, match=r"no site 'blocks\.9\.ffn'.*blocks\.0\.ffn"):
        run(bank, backbone, x, {second: Route.single(0), "blocks.9.ffn": Route.single(0)})


def test_soft_route_is_the_weighted_sum_and_differentiable(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, SMALL)
    place: Any = bank.at[0]
    tokens = torch.randn(2, 5, 16)
    weights = torch.tensor([[0.2, 0.0, 0.8], [0.5, 0.0, 0.1]], requires_grad=True)
    out = place._routed(tokens, tokens, Route.soft(weights))
    single = [SMALL.apply(tokens, place.params(slot)) for slot in range(3)]
    wanted = torch.stack([0.2 * single[0][0] + 0.8 * single[2][0], 0.5 * single[0][1] + 0.1 * single[2][1]])
    assert torch.allclose(out, wanted, atol=1e-6)
    out.sum().backward()
    assert weights.grad is not None
    assert weights.grad[0, 2].item() == pytest.approx(single[2][0].sum().item(), rel=1e-4)


def test_routes_nest_and_are_put_back_after_an_error(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, SMALL)
    plain, outer = backbone.features(x), run(bank, backbone, x, Route.single(0))
    with bank.route(Route.single(0)):
        with bank.route(Route.single(1)):
            assert not torch.equal(backbone.features(x), outer)
        assert torch.equal(backbone.features(x), outer)
        with pytest.raises(DataError), bank.route(Route.single(2)):
            backbone.features(torch.zeros(2, 4, 16, 16))
        assert torch.equal(backbone.features(x), outer)
        last = [module for module in backbone.encoder.modules() if isinstance(module, nn.LayerNorm)][-1]
        failing = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), bank.route(Route.single(2)):  # in the middle of a pass
            backbone.features(x)
        failing.remove()
        assert torch.equal(backbone.features(x), outer)
    assert torch.equal(backbone.features(x), plain)


def test_two_banks_on_one_backbone(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    """Each is silent while the other routes; together they add up."""
    one, two = filled(backbone, SMALL), filled(backbone, Bottleneck(bottleneck=4, mode="sequential"))
    alone = run(one, backbone, x, Route.single(0))
    with two.route(Route.single(1)):
        assert not torch.equal(backbone.features(x), alone)
        assert not torch.equal(run(one, backbone, x, Route.single(0)), alone)
    assert torch.equal(run(one, backbone, x, Route.single(0)), alone)


def test_dropout_in_training_only(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, Bottleneck(bottleneck=4, dropout=0.5, scale=1.0))
    still = run(bank, backbone, x, Route.single(0))
    noisy = [run(bank, backbone, x, Route.single(0), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.allclose(noisy[0], noisy[2])
    assert not torch.allclose(noisy[0], still)
    bank.train()
    assert torch.equal(run(bank, backbone, x, Route.single(0)), still), "the mode of the module decides nothing"


# --- slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t | {"blocks.0.ffn/down": torch.zeros(4, 15)},
            r"'blocks\.0\.ffn/down': expected \(4, 16\), got \(4, 15\)",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "blocks.1.ffn/up"},
            r"'blocks\.1\.ffn/up': expected \(16, 4\), got None",
        ),
        (lambda t: t | {"blocks.7.ffn/up": torch.zeros(1)}, r"'blocks\.7\.ffn/up': expected None, got \(1,\)"),
        (lambda t: {}, "do not fit this bank at 12 places"),
    ],
)
def test_tensors_that_do_not_fit(
    backbone: FrozenBackbone, filled: Filled, x: Tensor, spoil: Callable[[Any], Any], message: str
) -> None:
    bank = filled(backbone, SMALL)
    with pytest.raises(ClAdaptersError, match=message):
        bank.add_slot(spoil(bank.export(0)))
    assert [len(place.slots) for place in bank.at] == [3, 3, 3], "no site took half an adapter"  # type: ignore[arg-type]


def test_some_blocks_only(backbone: FrozenBackbone, x: Tensor) -> None:
    bank = AdapterBank(backbone, SMALL, blocks=[2, 0])
    assert [site.block for site in bank.sites] == [0, 2]
    assert {key.split("/")[0] for key in bank.fresh(torch.Generator())} == {"blocks.0.ffn", "blocks.2.ffn"}
    with pytest.raises(ClAdaptersError, match=r"blocks \[3, 9\] do not exist; the backbone has 0\.\.2"):
        AdapterBank(backbone, SMALL, blocks=[0, 9, 3])
    with pytest.raises(ClAdaptersError, match="at least one block"):
        AdapterBank(backbone, SMALL, blocks=[])


def test_freezing_takes_one_slot_out(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    bank = filled(backbone, SMALL, slots=2)
    run(bank, backbone, x, Route.hard(torch.tensor([0, 1, 0, 1, 0]))).sum().backward()
    bank.freeze(0)
    assert all(not p.requires_grad and p.grad is None for p in bank.slot_parameters(0))
    assert all(p.requires_grad and p.grad is not None for p in bank.slot_parameters(1))
    assert not run(bank, backbone, x, Route.single(0)).requires_grad, "no graph is recorded through frozen adapters"


def test_fresh_is_a_function_of_the_generator(backbone: FrozenBackbone) -> None:
    bank = AdapterBank(backbone, SMALL)
    before = torch.get_rng_state()
    first, again, other = (bank.fresh(torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.0.ffn/down"], other["blocks.0.ffn/down"])
    assert not torch.equal(first["blocks.0.ffn/down"], first["blocks.1.ffn/down"]), "sites differ"
    assert torch.equal(torch.get_rng_state(), before)


def test_slots_follow_the_type_of_the_backbone(backbone: FrozenBackbone, x: Tensor) -> None:
    backbone.double()
    bank = AdapterBank(backbone, SMALL)
    bank.add_slot(bank.fresh(torch.Generator()))
    assert run(bank, backbone, x.double(), Route.single(0)).dtype == torch.float64


# --- copies -------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent_both_ways(backbone: FrozenBackbone, filled: Filled, x: Tensor) -> None:
    pair = nn.ModuleList([backbone, filled(backbone, SMALL)])
    twin: Any = copy.deepcopy(pair)
    before = run(pair[1], backbone, x, Route.single(0))  # type: ignore[arg-type]
    assert torch.equal(run(twin[1], twin[0], x, Route.single(0)), before)
    with torch.no_grad():
        for parameter in twin[1].parameters():
            parameter.zero_()
    assert torch.equal(run(pair[1], backbone, x, Route.single(0)), before), "the original keeps its weights"  # type: ignore[arg-type]
    assert torch.equal(run(twin[1], twin[0], x, Route.single(0)), backbone.features(x)), "the copy uses its own"
    with pair[1].route(Route.single(0)):  # type: ignore[operator]
        assert torch.equal(twin[0].features(x), backbone.features(x)) is False
    twin[1].add_slot(twin[1].export(0))
    assert pair[1].num_slots == 3
