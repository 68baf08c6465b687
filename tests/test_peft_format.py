"""LoRA in PEFT's folder format: the same function in both libraries, and a refusal of what is not plain LoRA."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.adapters.lora import LoRA, Target
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.bank import AdapterBank, Route
from cl_adapters.batches import Inputs
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone, StorageError
from cl_adapters.interchange import export_peft, import_peft

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "cl_adapters.json"
ALL: tuple[Target, ...] = ("query", "key", "value")


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs peft: pip install cl-adapters[test]")


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> nn.Module:
    return tiny_vit(depth=2)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install cl-adapters[text]")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval()


@pytest.fixture(params=["ViT", "BERT"])
def encoder(request: pytest.FixtureRequest, vit: nn.Module) -> nn.Module:
    return vit if request.param == "ViT" else bert()


def inputs(encoder: nn.Module) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    if hasattr(encoder, "patch_embed"):
        return torch.randn(3, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 50, (3, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])}


def filled(backbone: FrozenBackbone, adapter: AdapterType, blocks: list[int] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    fresh = AdapterBank(backbone, adapter).fresh(generator, blocks)
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in fresh.items()}


def features(backbone: FrozenBackbone, adapter: AdapterType, tensors: dict[str, Tensor], x: Inputs) -> Tensor:
    bank = AdapterBank(backbone, adapter)
    with torch.no_grad(), bank.route(Route.single(bank.add_slot(tensors))):
        found: Tensor = backbone(x)
    return found


def peft_features(peft: Any, encoder: nn.Module, folder: Path, x: Inputs) -> Tensor:
    """Features of the same encoder in PEFT, pooled as ours are."""
    inside = copy.deepcopy(encoder)
    peft.PeftModel.from_pretrained(inside, folder).eval()
    with torch.no_grad():
        found: Tensor = FrozenBackbone.wrap(inside)(x)
    return found


def folder_of_peft(peft: Any, encoder: nn.Module, folder: Path, **options: Any) -> Tensor:
    """Save a random adapter made by PEFT; return its features."""
    inside = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(inside, peft.LoraConfig(**options)).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        found: Tensor = FrozenBackbone.wrap(inside)(inputs(encoder))
    return found


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * (1 + other.abs().max()))


# --- the same function ---------------------------------------------------------------------------------------------


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
    with pytest.raises(IncompatibleBackbone, match="the backbone has one"):  # the same layer under two names
        import_peft(folder, backbone)


def test_a_fresh_adapter_on_a_fused_projection(vit: nn.Module, tmp_path: Path) -> None:
    """Nothing tells the thirds apart, so all have all of A, and can still be trained."""
    backbone = FrozenBackbone.wrap(vit)
    tensors = AdapterBank(backbone, LoRA(rank=2)).fresh(torch.Generator().manual_seed(0))
    found = import_peft(export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone), backbone)
    assert found.adapter == LoRA(rank=4, targets=ALL)
    assert torch.equal(found.tensors["blocks.0.query/A"][2:], tensors["blocks.0.value/A"])
    assert not any(value.any() for key, value in found.tensors.items() if key.endswith("/B"))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(vit: nn.Module, tmp_path: Path) -> tuple[FrozenBackbone, Path]:
    """A backbone, and an adapter for it as from PEFT: without our file."""
    backbone = FrozenBackbone.wrap(vit)
    folder = export_peft(tmp_path / "adapter", filled(backbone, LoRA(rank=2)), LoRA(rank=2), backbone)
    (folder / OURS).unlink()
    return backbone, folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA'; only LORA"),
        ({"use_dora": True}, "uses use_dora=True; only plain LoRA"),
        ({"bias": "all"}, "uses bias='all'"),
        ({"modules_to_save": ["head"]}, "uses modules_to_save"),
        ({"some_new_variant": {"x": 1}}, "uses some_new_variant"),
        ({"init_lora_weights": "pissa"}, "initialised with 'pissa', which also changes the backbone"),
        ({"init_lora_weights": []}, "initialised with"),
        ({"r": 8}, r"says that 'blocks.0.attn.qkv' has rank 8, its tensors have 4"),
        ({"lora_alpha": "4"}, "lora_alpha must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "no plain module name"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, "must be objects"),
    ],
)
def test_more_than_plain_lora(saved: tuple[FrozenBackbone, Path], change: dict[str, Any], message: str | None) -> None:
    backbone, folder = saved
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    if message is None:
        import_peft(folder, backbone)
        return
    with pytest.raises(StorageError, match=message):
        import_peft(folder, backbone)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"LORA"', "[" * 100_000, "x" * 2**20 + "y"])
def test_damaged_configurations(saved: tuple[FrozenBackbone, Path], text: str) -> None:
    backbone, folder = saved
    (folder / CONFIG).write_text(text)
    with pytest.raises(StorageError, match=r"adapter_config.json"):
        import_peft(folder, backbone)


class Trap:
    """Reads as a call, if anything unpickles it."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


def test_pickles_are_never_read(saved: tuple[FrozenBackbone, Path]) -> None:
    backbone, folder = saved
    (folder / TENSORS).unlink()
    with pytest.raises(StorageError, match=r"adapter_model.safetensors is missing"):
        import_peft(folder, backbone)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(StorageError, match=r"adapter_model.bin, a pickle.*safe_serialization=True"):
        import_peft(folder, backbone)
    (folder / "adapter_model.bin").rename(folder / TENSORS)
    with pytest.raises(StorageError, match="not a readable safetensors file"):
        import_peft(folder, backbone)


def test_tensors_that_are_no_plain_lora(saved: tuple[FrozenBackbone, Path]) -> None:
    backbone, folder = saved
    whole, key = load_file(folder / TENSORS), "base_model.model.blocks.0.attn.qkv.lora_{}.weight"
    magnitude = {"base_model.model.blocks.0.attn.qkv.lora_magnitude_vector": torch.ones(96)}
    for change, message in (
        (magnitude, "only the matrices"),
        ({"base_model.model.head.weight": torch.ones(2, 32)}, r"Heads \(modules_to_save\) must stay out"),
        ({key.format("A"): torch.ones(3, 32)}, r"needs A \[r, D\] and B \[O, r\]"),
        ({key.format("A"): torch.ones(4, 32, dtype=torch.int64)}, "only the matrices"),
    ):
        save_file(whole | change, folder / TENSORS)
        with pytest.raises(StorageError, match=message):
            import_peft(folder, backbone)
    save_file({name: value for name, value in whole.items() if name != key.format("A")}, folder / TENSORS)
    with pytest.raises(StorageError, match="needs A"):
        import_peft(folder, backbone)
    save_file({}, folder / TENSORS)
    with pytest.raises(StorageError, match="has no tensors"):
        import_peft(folder, backbone)


def test_another_backbone(saved: tuple[FrozenBackbone, Path], tiny_vit: Any, tmp_path: Path) -> None:
    backbone, folder = saved
    narrow = FrozenBackbone.wrap(tiny_vit(width=16))
    with pytest.raises(IncompatibleBackbone, match=r"96 x 32 at 'blocks.0.attn.qkv', the backbone has one of 48 x 16"):
        import_peft(folder, narrow)
    with pytest.raises(IncompatibleBackbone, match="no query, key or value projections"):
        import_peft(folder, FrozenBackbone.wrap(nn.Linear(3, 3), num_features=3, sites=[]))
    whole = load_file(folder / TENSORS)
    save_file({name.replace("attn.qkv", "mlp.fc1"): value for name, value in whole.items()}, folder / TENSORS)
    with pytest.raises(IncompatibleBackbone, match=r"changes 'blocks.0.mlp.fc1', but.*such as 'blocks.0.attn.qkv'"):
        import_peft(folder, backbone)
    ours = export_peft(tmp_path / "noted", filled(backbone, LoRA(rank=2)), LoRA(rank=2), backbone)
    twin = FrozenBackbone.wrap(tiny_vit(seed=1, depth=2))
    with pytest.raises(
        IncompatibleBackbone, match=rf"for the backbone 'VisionTransformer' \({backbone.fingerprint[:12]}"
    ):
        import_peft(ours, twin)
    with pytest.raises(ClAdaptersError, match="no such site"):
        export_peft(
            tmp_path / "b", {"blocks.9.key/A": torch.ones(2, 32), "blocks.9.key/B": torch.ones(32, 2)}, LoRA(), twin
        )


def test_a_type_that_is_asked_for(saved: tuple[FrozenBackbone, Path], vit: nn.Module) -> None:
    """Wider types are filled up with zeros; narrower ones are refused."""
    backbone, folder = saved
    wide = LoRA(rank=5, targets=ALL, scale=0.1)
    found, narrow = import_peft(folder, backbone, wide), import_peft(folder, backbone)
    x = inputs(vit)
    assert found.adapter == wide
    assert close(features(backbone, wide, found.tensors, x), features(backbone, narrow.adapter, narrow.tensors, x))
    with pytest.raises(ClAdaptersError, match="changes the value projections, which"):
        import_peft(folder, backbone, LoRA(rank=2, targets=("key",)))
    with pytest.raises(ClAdaptersError, match="has rank 2, more than"):
        import_peft(folder, backbone, LoRA(rank=1))


def test_what_cannot_be_exported(vit: nn.Module, tmp_path: Path) -> None:
    backbone, bottleneck = FrozenBackbone.wrap(vit), adapter_from("bottleneck")
    with pytest.raises(ConfigError, match="'bottleneck' cannot be exported: PEFT has only low-rank"):
        export_peft(tmp_path / "a", filled(backbone, bottleneck), bottleneck, backbone)
    with pytest.raises(ClAdaptersError, match="nothing to export"):
        export_peft(tmp_path / "a", {}, LoRA(), backbone)
    tensors = filled(backbone, LoRA(rank=2))
    export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone)
    with pytest.raises(StorageError, match="exists already"):
        export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone)
    export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone, overwrite=True)
    shutil.rmtree(tmp_path / "a")
