"""What cannot be a PEFT folder, or is no plain LoRA in one: refused, never half read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cl_adapters.adapters.base import adapter_from
from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone, StorageError
from cl_adapters.interchange import export_peft, import_peft
from tests.interchange.conftest import ALL, CONFIG, OURS, TENSORS, close, features, filled, inputs


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
    with pytest.raises(IncompatibleBackbone, match="no linear layers that LoRA knows"):
        import_peft(folder, FrozenBackbone.wrap(nn.Linear(3, 3), num_features=3, sites=[]))
    whole = load_file(folder / TENSORS)
    save_file({name.replace("attn.qkv", "norm1"): value for name, value in whole.items()}, folder / TENSORS)
    with pytest.raises(
        IncompatibleBackbone, match=r"changes 'blocks.0.norm1', but.*query, key, value.*such as 'blocks.0.attn.qkv'"
    ):
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
