"""LoRA against dense weights: what a projection computes with the update is W + s B A, written out in NumPy.

LAE (algorithm as released, pet/lora.py): rank 5 on the key and value thirds of the fused projection, each with a
learned number s that starts at 1; A Kaiming-uniform with a = sqrt 5, B zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.sites.sites import Site, Tap

LAE = LoRA(rank=5, learn_scale=True)


def site(width: int = 768, out_width: int = 768) -> Site:
    return Site("blocks.0.key", 0, "key", width, Tap("qkv", "in"), Tap("qkv", "out"), out_width=out_width, qkv_part=1)


@pytest.mark.parametrize("learned", [False, True])
def test_delta_is_a_dense_matrix_of_low_rank(learned: bool) -> None:
    """delta = x (s B A)^T in float64; D and O differ, so that a transposed matrix would show."""
    rng = np.random.default_rng(0)
    x, A, B = rng.standard_normal((2, 5, 24)), rng.standard_normal((3, 24)), rng.standard_normal((16, 3))
    lora = LoRA(rank=3, scale=0.5, learn_scale=learned)
    params = {"A": torch.from_numpy(A), "B": torch.from_numpy(B)}
    assert lora.shapes(site(24, 16)) == {"A": (3, 24), "B": (16, 3)} | ({"scale": (1,)} if learned else {})
    scale = 0.5
    if learned:
        scale, params["scale"] = -1.7, torch.tensor([-1.7], dtype=torch.float64)
    delta = lora.apply(torch.from_numpy(x), params).numpy()
    assert np.abs(delta - x @ (scale * B @ A).T).max() < 1e-12
    assert np.linalg.matrix_rank(delta.reshape(-1, 16)) == 3


def test_features_are_those_of_the_updated_weights(tiny_vit: Callable[..., nn.Module]) -> None:
    """A ViT whose fused weight holds W + dW in its key and value thirds, the query third as it was."""
    model: Any = tiny_vit()
    merged = copy.deepcopy(model)
    backbone = FrozenBackbone.wrap(model)
    bank = AdapterBank(backbone, LAE)
    generator = torch.Generator().manual_seed(0)
    tensors = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in bank.fresh(generator).items()}
    bank.add_slot(tensors)
    with torch.no_grad():
        for i, block in enumerate(merged.blocks):
            for third, kind in ((1, "key"), (2, "value")):
                A, B, s = (tensors[f"blocks.{i}.{kind}/{name}"] for name in ("A", "B", "scale"))
                block.attn.qkv.weight[32 * third : 32 * (third + 1)] += s * B @ A
    x = torch.randn(3, 3, 32, 32, generator=generator)
    projected: list[Tensor] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: projected.append(output))
    plain = backbone.features(x)
    with bank.route(Route.single(0)):
        routed = backbone.features(x)
    assert torch.allclose(routed, merged(x), atol=1e-5)
    assert not torch.allclose(routed, plain, atol=1e-2)
    query, rest = (projected[1] - projected[0]).split((32, 64), -1)
    assert not query.any(), "the query third of the delta is exactly 0"
    assert rest.any()


def test_number_of_parameters_of_lae() -> None:
    """Two projections of 2 * 5 * 768 and their scales: 15,362 per block, 76,810 in the five blocks of LAE."""
    per_block = len(LAE.site_kinds) * LAE.num_parameters(site())
    assert per_block == 15_362
    assert 5 * per_block == 76_810
    assert 2 * LoRA(rank=5).num_parameters(site()) == 15_360, "without the learned scales"


def test_fresh_lora_adds_nothing_and_is_drawn_as_published() -> None:
    params = LAE.init(site(), torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(768)
    assert bound * 0.99 < float(params["A"].abs().max()) <= bound
    assert float(params["A"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not params["B"].any()
    assert params["scale"].tolist() == [1.0]
    assert torch.equal(LAE.apply(torch.randn(2, 5, 768), params), torch.zeros(2, 5, 768))


def test_scale_alone_learns_at_the_start_of_nothing_but_b() -> None:
    """B is 0: at the first step only B has a gradient, as for every LoRA."""
    params = {k: v.requires_grad_() for k, v in LAE.init(site(), torch.Generator().manual_seed(0)).items()}
    LAE.apply(torch.randn(2, 5, 768), params).sum().backward()
    gradients = {name: value.grad for name, value in params.items()}
    assert gradients["B"] is not None and gradients["B"].any()
    assert all(gradients[name] is not None and not gradients[name].any() for name in ("A", "scale"))  # type: ignore[union-attr]


def test_dropout_is_on_the_input_of_a() -> None:
    """As in PEFT: entries of x go, not entries of the bottleneck."""
    lora = LoRA(rank=1, dropout=0.3)
    params = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    delta = lora.apply(torch.ones(1, 20_000, 4), params, torch.Generator().manual_seed(0))
    levels = delta.unique()
    assert levels.tolist() == pytest.approx([k / 0.7 for k in range(5)], rel=1e-5), "each of the four goes by itself"
    assert delta.mean().item() == pytest.approx(4, rel=0.01)
