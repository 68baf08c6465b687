"""The prefix against attention computed in full: one softmax over the tokens' columns and the prefix's.

LAE (algorithm as released, pet/prefix.py:34-46): prefix keys and values stand at position 1, behind the class token's;
after the softmax the prefix columns are divided by max(lambda, 1e-12), lambda their mass, the others stay, so that each
row sums to 2 - lambda. The reference here never splits the softmax as the code under test does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters.prefix import Prefix
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.sites.sites import Site, Tap

WIDTH, HEADS, LENGTH = 32, 4, 3
SITE = Site(
    "blocks.0.attention", 0, "attention", 3 * 768, Tap("qkv", "out"), Tap("proj", "in"), out_width=768, heads=12
)


def attention(**options: Any) -> Any:
    """A timm attention with all weights drawn."""
    from timm.layers import Attention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attention(WIDTH, num_heads=HEADS, qkv_bias=True, **options).double().eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def drawn(seed: int = 1, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH, HEADS, WIDTH // HEADS)
    params = {name: size * torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("key", "value")}
    return params | {"scale_key": torch.tensor([1.3]).double(), "scale_value": torch.tensor([-0.7]).double()}


def in_full(module: Any, x_BND: Tensor, params: dict[str, Tensor], position: int, compensate: bool) -> Any:
    """(output before the projection, attention rows), with the prefix among the tokens at ``position``."""
    B, N, _ = x_BND.shape
    q, k, v = module.qkv(x_BND).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    own_k, own_v = ((params[n] * params[f"scale_{n}"]).permute(1, 0, 2).expand(B, -1, -1, -1) for n in ("key", "value"))
    k = torch.cat([k[:, :, :position], own_k, k[:, :, position:]], 2)
    v = torch.cat([v[:, :, :position], own_v, v[:, :, position:]], 2)
    rows = torch.softmax(q @ k.transpose(-2, -1) * module.scale, -1)
    here = slice(position, position + LENGTH)
    mass = rows[..., here].sum(-1, keepdim=True)
    if compensate:
        rows = rows.clone()
        rows[..., here] /= mass.clamp_min(1e-12)
    return (rows @ v).transpose(1, 2).reshape(B, N, WIDTH), rows, mass.squeeze(-1)


def delta_of(module: Any, x_BND: Tensor, params: dict[str, Tensor], compensate: bool, y: bool) -> tuple[Tensor, Tensor]:
    """(what the type adds, what the heads put out without it)."""
    seen: list[Tensor] = []
    handle = module.proj.register_forward_pre_hook(lambda proj, args: seen.append(args[0]))
    module(x_BND)
    handle.remove()
    prefix = Prefix(length=LENGTH, compensate=compensate)
    return prefix.apply(module.qkv(x_BND), params, None, seen[0] if y else None), seen[0]


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("y", [True, False], ids=["given", "recomputed"])
def test_equals_attention_over_all_columns(compensate: bool, y: bool) -> None:
    module, x = attention(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    params = drawn()
    wanted, rows, mass = in_full(module, x, params, 1, compensate)
    sums = 2 - mass if compensate else torch.ones_like(mass)
    assert torch.allclose(rows.sum(-1), sums, atol=1e-12), "each row sums to 2 - lambda"
    assert mass.min() > 0.02 and mass.max() < 0.98, "the prefix is neither ignored nor all there is"
    delta, plain = delta_of(module, x, params, compensate, y)
    assert (plain + delta - wanted).abs().max() < 1e-12
    assert delta.abs().max() > 0.1


def test_row_sums_of_the_type_itself() -> None:
    """With all values 1 a head puts out the sum of its row: 2 - lambda."""
    module, x = attention(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    params = drawn() | {"value": torch.ones(LENGTH, HEADS, WIDTH // HEADS).double()}
    params["scale_value"] = torch.ones(1).double()
    with torch.no_grad():
        module.qkv.weight[2 * WIDTH :] = 0
        module.qkv.bias[2 * WIDTH :] = 1
    delta, plain = delta_of(module, x, params, True, True)
    mass = in_full(module, x, params, 1, True)[2]
    sums = (plain + delta).unflatten(-1, (HEADS, -1))[..., 0].transpose(1, 2)
    assert torch.allclose(sums, 2 - mass, atol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 5])
def test_position_does_not_matter(position: int) -> None:
    module, x = attention(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    delta, plain = delta_of(module, x, drawn(), True, True)
    assert (plain + delta - in_full(module, x, drawn(), position, True)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("fused", [True, False])
def test_in_a_block_of_timm(tiny_vit: Any, fused: bool) -> None:
    """Through the hooks of a bank, with timm's fused attention and without: features equal those of a patched block."""
    model = tiny_vit(width=WIDTH, heads=HEADS, depth=2).double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    backbone = FrozenBackbone.wrap(model)
    bank = AdapterBank(backbone, Prefix(length=LENGTH), blocks=[1])
    bank.add_slot({f"{bank.sites[0].name}/{name}": value for name, value in drawn().items()})
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    plain = backbone.features(x)
    with bank.route(Route.single(0)):
        routed = backbone.features(x)

    attn: Any = model.blocks[1].attn
    attn.proj.register_forward_pre_hook(lambda proj, args: (in_full(attn, tokens[0], drawn(), 1, True)[0],))
    tokens: list[Tensor] = []
    attn.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    assert (routed - backbone.features(x)).abs().max() < 1e-10
    assert (routed - plain).abs().max() > 1e-2


def test_prefix_that_nobody_sees_has_no_effect() -> None:
    """LAE's floor: below a mass of 1e-12 the division no longer lifts the prefix up to its full weight."""
    module, x = attention(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    query = module.qkv(x)[..., :WIDTH].unflatten(-1, (HEADS, -1))[0, 0]  # of one token, [H, hd]
    params = drawn() | {"key": (-60 * query / query.square().sum(-1, keepdim=True) * 3).expand(LENGTH, -1, -1)}
    delta, plain = delta_of(module, x, params, True, True)
    wanted, _, mass = in_full(module, x, params, 1, True)
    assert mass[0, :, 0].max() < 1e-12
    assert (plain + delta - wanted).abs().max() < 1e-10
    assert delta[0, 0].abs().max() < 1.0


def test_number_of_parameters_of_lae() -> None:
    """Ten keys and ten values of 768 and two scales: 15,362 per block, 76,810 in the five blocks of LAE."""
    assert Prefix().num_parameters(SITE) == 15_362
    assert 5 * Prefix().num_parameters(SITE) == 76_810
    assert Prefix().shapes(SITE)["key"] == (10, 12, 64)


def test_fresh_prefix_is_drawn_as_published() -> None:
    """Uniform in [0, 0.01]; scales 1. Not the identity: with small keys the tokens share their attention with it."""
    params = Prefix().init(SITE, torch.Generator().manual_seed(0))
    for name in ("key", "value"):
        assert params[name].min() >= 0 and params[name].max() <= 0.01
        assert float(params[name].mean()) == pytest.approx(0.005, rel=0.05)
    assert params["scale_key"].tolist() == params["scale_value"].tolist() == [1.0]
    qkv = torch.randn(1, 5, 3 * 768, generator=torch.Generator().manual_seed(0))
    assert Prefix().apply(qkv, params).abs().max() > 0.1
