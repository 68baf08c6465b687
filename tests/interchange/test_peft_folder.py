"""LoRA in PEFT's folder format: the same function in both libraries."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.interchange import export_peft, import_peft
from tests.interchange.conftest import (
    ALL,
    CONFIG,
    TENSORS,
    bert,
    close,
    features,
    filled,
    folder_of_peft,
    inputs,
    peft_features,
)


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=3),
        LoRA(rank=2, targets=("value",), scale=0.5),
        LoRA(rank=2, targets=ALL, learn_scale=True, dropout=0.1),
    ],
)
def test_there_and_back(peft: Any, encoder: nn.Module, adapter: LoRA, tmp_path: Path) -> None:
    backbone = FrozenBackbone.wrap(copy.deepcopy(encoder))
    tensors, x = filled(backbone, adapter), inputs(encoder)
    ours = features(backbone, adapter, tensors, x)
    with torch.no_grad():
        assert not close(ours, backbone(x)), "the adapter changes something"
    folder = export_peft(tmp_path / "adapter", tensors, adapter, backbone)
    assert close(peft_features(peft, encoder, folder, x), ours)
    back = import_peft(folder, backbone)
    assert (back.adapter.rank, set(back.adapter.targets)) == (adapter.rank, set(adapter.targets)), "split again"
    assert back.adapter.dropout == adapter.dropout
    assert close(features(backbone, back.adapter, back.tensors, x), ours)
    again = import_peft(folder, backbone, adapter)
    assert again.adapter == adapter
    assert close(features(backbone, adapter, again.tensors, x), ours)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}, 1.0),
    ],
)
def test_an_adapter_made_by_peft(
    peft: Any, encoder: nn.Module, options: dict[str, Any], scaling: float, tmp_path: Path
) -> None:
    """On the whole fused projection, all thirds share A."""
    fused = hasattr(encoder, "patch_embed")
    theirs = folder_of_peft(peft, encoder, tmp_path, target_modules=["qkv"] if fused else ["query", "value"], **options)
    backbone = FrozenBackbone.wrap(copy.deepcopy(encoder))
    found = import_peft(tmp_path, backbone)
    assert found.adapter == LoRA(
        rank=options["r"], targets=ALL if fused else ("query", "value"), dropout=options.get("lora_dropout", 0.0)
    )
    assert close(features(backbone, found.adapter, found.tensors, inputs(encoder)), theirs)
    if fused:
        b = load_file(tmp_path / TENSORS)["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
        assert torch.allclose(found.tensors["blocks.0.key/B"], scaling * b[32:64])
    folder = export_peft(tmp_path / "again", found.tensors, found.adapter, backbone)
    assert close(peft_features(peft, encoder, folder, inputs(encoder)), theirs)


def test_ranks_and_scales_of_single_modules(peft: Any, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"layer.1.attention.self.value": 5}, "alpha_pattern": {"query": 1}}
    encoder = bert()
    theirs = folder_of_peft(peft, encoder, tmp_path, r=2, lora_alpha=6, target_modules=["query", "value"], **patterns)
    backbone = FrozenBackbone.wrap(copy.deepcopy(encoder))
    found = import_peft(tmp_path, backbone)
    assert found.adapter.rank == 5
    assert close(features(backbone, found.adapter, found.tensors, inputs(encoder)), theirs)


def test_some_blocks_only(peft: Any, encoder: nn.Module, tmp_path: Path) -> None:
    backbone, adapter = FrozenBackbone.wrap(copy.deepcopy(encoder)), LoRA(rank=2)
    tensors, x = filled(backbone, adapter, [1]), inputs(encoder)
    folder = export_peft(tmp_path / "a", tensors, adapter, backbone)
    ours = features(backbone, adapter, tensors, x)
    assert close(peft_features(peft, encoder, folder, x), ours)
    back = import_peft(folder, backbone, adapter)
    assert back.tensors.keys() == tensors.keys()
    assert close(features(backbone, adapter, back.tensors, x), ours)


def test_one_third_here_and_another_there(peft: Any, vit: nn.Module, tmp_path: Path) -> None:
    """Ranks differ between the layers: zeros fill up, and the function stays."""
    backbone, adapter = FrozenBackbone.wrap(copy.deepcopy(vit)), LoRA(rank=2)
    tensors = {key: value for key, value in filled(backbone, adapter).items() if not key.startswith("blocks.0.key")}
    folder = export_peft(tmp_path / "a", tensors, adapter, backbone)
    ours, found = features(backbone, adapter, tensors, inputs(vit)), import_peft(folder, backbone)
    assert close(peft_features(peft, vit, folder, inputs(vit)), ours)
    assert close(features(backbone, found.adapter, found.tensors, inputs(vit)), ours)


def test_the_fused_layout(vit: nn.Module, tmp_path: Path) -> None:
    """Rank 2 + 2; rows of the query zero; the key's rows see the key's A only. Without peft."""
    backbone, adapter = FrozenBackbone.wrap(vit), LoRA(rank=2, scale=0.5)
    tensors = filled(backbone, adapter)
    export_peft(tmp_path / "a", tensors, adapter, backbone)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert config["target_modules"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    saved = load_file(tmp_path / "a" / TENSORS)
    a, b = (saved[f"base_model.model.blocks.1.attn.qkv.lora_{x}.weight"] for x in "AB")
    assert torch.equal(a, torch.cat([tensors["blocks.1.key/A"], tensors["blocks.1.value/A"]]))
    expected = torch.zeros(96, 4)
    expected[32:64, :2] = 0.5 * tensors["blocks.1.key/B"]
    expected[64:, 2:] = 0.5 * tensors["blocks.1.value/B"]
    assert torch.equal(b, expected)


def test_a_fresh_adapter_and_a_prefix_in_the_names(tmp_path: Path) -> None:
    """B is 0 everywhere, and no third is left out for that; a task model holds the encoder under a name."""
    backbone = FrozenBackbone.wrap(bert())
    tensors = AdapterBank(backbone, LoRA(rank=2)).fresh(torch.Generator().manual_seed(0))
    folder = export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone)
    saved = load_file(folder / TENSORS)
    save_file({key.replace("model.encoder", "model.bert.encoder"): v for key, v in saved.items()}, folder / TENSORS)
    back = import_peft(folder, backbone)
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[key], tensors[key]) for key in tensors)
    save_file(saved | load_file(folder / TENSORS), folder / TENSORS)
    with pytest.raises(IncompatibleBackbone, match="layers of different encoders"):  # the same layer under two names
        import_peft(folder, backbone)


def test_a_fresh_adapter_on_a_fused_projection(vit: nn.Module, tmp_path: Path) -> None:
    """Nothing tells the thirds apart, so all have all of A, and can still be trained."""
    backbone = FrozenBackbone.wrap(vit)
    tensors = AdapterBank(backbone, LoRA(rank=2)).fresh(torch.Generator().manual_seed(0))
    found = import_peft(export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone), backbone)
    assert found.adapter == LoRA(rank=4, targets=ALL)
    assert torch.equal(found.tensors["blocks.0.query/A"][2:], tensors["blocks.0.value/A"])
    assert not any(value.any() for key, value in found.tensors.items() if key.endswith("/B"))
