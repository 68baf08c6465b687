"""LayerNorm tuning, alone and beside LoRA as one adapter: numbers, training, files, merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.adapters.ln_tuning import LNTuning
from cl_adapters.adapters.lora import LoRA
from cl_adapters.adapters.pair import Pair
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.interchange import export_peft
from cl_adapters.merge.adapters import merge_adapters
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import RanPAC
from tests.avalanche.streams import two_experiences

Vit = Callable[[], nn.Module]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def drawn(bank: AdapterBank, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in bank.fresh(generator).items()}


def test_a_pair_is_both_at_once_in_batches_of_several_too(vit: Vit) -> None:
    """What two banks of the parts give together, on one backbone."""
    backbone = FrozenBackbone.wrap(vit())
    pair, x = AdapterBank(backbone, Pair()), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lora, norms = AdapterBank(backbone, LoRA()), AdapterBank(backbone, LNTuning())
    for seed in range(2):
        tensors = drawn(pair, seed)
        pair.add_slot(tensors)
        for part in (lora, norms):
            part.add_slot({key: tensors[key] for key in part.fresh(torch.Generator())})
    for route in (Route.single(1), Route.hard(torch.tensor([1, 0, -1, 1])), Route.soft(torch.rand(4, 2))):
        with pair.route(route):
            both = backbone.features(x)
        with lora.route(route), norms.route(route):
            assert torch.equal(backbone.features(x), both)
    assert not torch.allclose(both, backbone.features(x), atol=1e-3)


def test_a_first_task_with_layer_norms_is_learned_saved_and_read(vit: Vit, tmp_path: Path) -> None:
    model = vit()
    adapter = {"type": "pair", "first": {"type": "lora", "rank": 3}}
    strategy: Any = RanPAC(model, adapter=adapter, train_epochs=1, train_mb_size=6, projection=16, evaluator=None)
    for experience in two_experiences():
        strategy.train(experience)
    learned = strategy.model.bank.export(0)
    assert {key.rpartition("/")[0] for key in learned if learned[key].any()} == {
        f"blocks.{block}.{site}" for block in (0, 1) for site in ("key", "value", "attn_norm", "ffn_norm")
    }
    strategy.model.save(tmp_path / "model")
    again = AdapterModel.load(tmp_path / "model", FrozenBackbone.wrap(model))
    assert again.bank is not None
    assert again.bank.adapter == Pair(first=LoRA(rank=3))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.predict(x), strategy.model.predict(x))


def test_a_pair_of_a_pair_and_one_with_feature_maps() -> None:
    from tests.contracts.families import case_of

    three = adapter_from({"type": "pair", "first": "pair", "second": "bottleneck"})
    backbone = case_of("ViT").backbone
    assert len(AdapterBank(backbone, three).sites) == 5 * backbone.depth
    maps = {"type": "pair", "first": "conv_bottleneck", "second": {"type": "ln_tuning", "place": "ffn"}}
    case = case_of("ConvNeXt")
    bank = AdapterBank(case.backbone, adapter_from(maps))
    bank.add_slot(drawn(bank, 0))
    with bank.route(Route.single(0)):
        assert not torch.allclose(case.backbone.features(case.inputs(2)), torch.zeros(()))
    with pytest.raises(ClAdaptersError, match="needs feature maps"):
        AdapterBank(case_of("ViT").backbone, adapter_from(maps))


def two(adapter: AdapterType, vit: Vit) -> list[dict[str, Tensor]]:
    bank = AdapterBank(FrozenBackbone.wrap(vit()), adapter)
    return [drawn(bank, seed) for seed in (0, 1)]


def test_layer_norms_are_merged_without_a_lineage_and_pairs_within_one(vit: Vit) -> None:
    """A channel is the same channel in every adapter of the backbone; the hidden units of LoRA are not."""
    one, other = two(LNTuning(), vit)
    merged = merge_adapters([one, other], LNTuning(), "mean")
    assert all(torch.equal(merged.tensors[key], (one[key] + other[key]) / 2) for key in one)
    with pytest.raises(ConfigError, match=r"'pair' are no linear maps.*lineage=True"):
        merge_adapters(two(Pair(), vit), Pair(), "mean")
    assert merge_adapters(two(Pair(), vit), Pair(), "mean", lineage=True).adapter == Pair()


@pytest.mark.parametrize("name", ["ln_tuning", "pair"])
def test_peft_does_not_get_them(name: str, vit: Vit, tmp_path: Path) -> None:
    backbone, adapter = FrozenBackbone.wrap(vit()), adapter_from(name)
    with pytest.raises(ConfigError, match=f"adapters of type '{name}' cannot be exported: PEFT"):
        export_peft(tmp_path / "peft", drawn(AdapterBank(backbone, adapter), 0), adapter, backbone)
