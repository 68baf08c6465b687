"""LoRA on language models in PEFT's format: the same features and logits here and there, with a head and without."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_adapters.adapters.lora import LoRA, Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ConfigError, IncompatibleBackbone, StorageError, UnknownName
from cl_adapters.interchange import export_peft, import_peft
from cl_adapters.pool import AdapterPool, PoolClass
from tests.interchange.conftest import (
    CONFIG,
    TENSORS,
    bert,
    close,
    features,
    filled,
    folder_of_peft,
    gpt2,
    inputs,
    llama,
    peft_features,
    with_head,
)

MAKE = {"Llama": llama, "GPT2": gpt2, "Bert": bert}
NAMES = {"Llama": "model", "GPT2": "transformer", "Bert": "bert"}
TARGETS: dict[str, tuple[Target, ...]] = {
    "Llama": ("query", "key", "value", "output", "up", "gate", "down"),
    "GPT2": ("query", "key", "value", "output", "up", "down"),
    "Bert": ("query", "key", "value", "output", "up", "down"),
}
FAMILIES = pytest.mark.parametrize("family", list(MAKE))


def logits(model: Any) -> Tensor:
    """Of the texts in :func:`inputs`, float32 [3, 7, 50]."""
    with torch.no_grad():
        found: Tensor = model(**dict(inputs(model))).logits
    return found


def parts(family: str) -> tuple[Any, FrozenBackbone]:
    """A model with a head, and its encoder as a backbone."""
    model = with_head(family)
    return model, FrozenBackbone.wrap(getattr(model, NAMES[family]))


def adapted(model: nn.Module, backbone: FrozenBackbone, adapter: LoRA, tensors: dict[str, Tensor]) -> Tensor:
    """Logits with one of our adapters on the encoder."""
    bank = AdapterBank(backbone, adapter)
    with bank.route(Route.single(bank.add_slot(tensors))):
        return logits(model)


# --- ours in PEFT --------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("blocks", [None, [1]])
def test_every_layer_of_an_encoder(peft: Any, family: str, blocks: list[int] | None, tmp_path: Path) -> None:
    encoder = MAKE[family]()
    backbone, adapter = FrozenBackbone.wrap(copy.deepcopy(encoder)), LoRA(rank=2, targets=TARGETS[family], scale=0.7)
    tensors, x = filled(backbone, adapter, blocks), inputs(encoder)
    ours = features(backbone, adapter, tensors, x)
    with torch.no_grad():
        assert not close(ours, backbone(x)), "the adapter changes something"
    folder = export_peft(tmp_path / "a", tensors, adapter, backbone)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(fan_in_fan_out|missing|Found).*")  # keys that PEFT does not find
        assert close(peft_features(peft, encoder, folder, x), ours)
    back = import_peft(folder, backbone, adapter if family == "Llama" else None)
    assert set(back.adapter.targets) == set(adapter.targets)
    assert {key.rpartition("/")[0] for key in back.tensors} == {key.rpartition("/")[0] for key in tensors}
    assert close(features(backbone, back.adapter, back.tensors, x), ours)


@FAMILIES
def test_an_adapter_for_the_model_with_its_head(peft: Any, family: str, tmp_path: Path) -> None:
    model, backbone = parts(family)
    clean, adapter = copy.deepcopy(model), LoRA(rank=3, targets=TARGETS[family])
    tensors = filled(backbone, adapter)
    ours = adapted(model, backbone, adapter, tensors)
    assert not close(ours, logits(clean))
    options: dict[str, Any] = {"prefix": "bert"} if family == "Bert" else {"task_type": "CAUSAL_LM"}
    folder = export_peft(tmp_path / "a", tensors, adapter, backbone, **options)
    inside = peft.PeftModel.from_pretrained(copy.deepcopy(clean), folder).eval()
    assert type(inside).__name__ == ("PeftModel" if family == "Bert" else "PeftModelForCausalLM")
    assert close(logits(inside), ours)
    back = import_peft(folder, backbone, adapter if family == "Llama" else None)
    assert close(adapted(model, backbone, back.adapter, back.tensors), ours)


@FAMILIES
def test_what_the_folder_says(family: str, tmp_path: Path) -> None:
    """Without peft: the names of the model, of its layers, and how GPT-2's weights lie."""
    _, backbone = parts(family)
    tensors = filled(backbone, LoRA(rank=2))
    alone, head = export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone), tmp_path / "b"
    config = json.loads((alone / CONFIG).read_text())
    encoder: Any = backbone.encoder
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == ("LORA", None, None)
    assert config["fan_in_fan_out"] == (family == "GPT2")
    assert config["auto_mapping"]["base_model_class"] == type(encoder).__name__
    assert all(isinstance(encoder.get_submodule(name), nn.Module) for name in config["target_modules"])
    encoder.config._name_or_path = encoder.name_or_path = "someone/some-model"
    export_peft(head, tensors, LoRA(rank=2), backbone, task_type="SEQ_CLS")
    inside = json.loads((head / CONFIG).read_text())
    assert (inside["task_type"], inside["base_model_name_or_path"]) == ("SEQ_CLS", "someone/some-model")
    assert inside["target_modules"] == [f"{NAMES[family]}.{name}" for name in config["target_modules"]]
    assert "auto_mapping" not in inside
    start = "base_model.model."
    renamed = {key.replace(start, f"{start}{NAMES[family]}.", 1) for key in load_file(alone / TENSORS)}
    assert renamed == set(load_file(head / TENSORS))


def test_the_auto_classes_of_peft_find_the_model(peft: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with_head("Llama").save_pretrained(tmp_path / "model")
    backbone = FrozenBackbone.wrap(transformers.AutoModel.from_pretrained(tmp_path / "model"))
    adapter = LoRA(rank=2, targets=("query", "down"))
    tensors, x = filled(backbone, adapter), inputs(backbone.encoder)
    ours = features(backbone, adapter, tensors, x)
    alone = export_peft(tmp_path / "a", tensors, adapter, backbone)
    loaded = peft.AutoPeftModel.from_pretrained(alone)
    with torch.no_grad():
        assert close(FrozenBackbone.wrap(loaded.get_base_model())(x), ours)
    head = export_peft(tmp_path / "b", tensors, adapter, backbone, task_type="CAUSAL_LM")
    causal = peft.AutoPeftModelForCausalLM.from_pretrained(head)
    with torch.no_grad():
        assert close(FrozenBackbone.wrap(causal.get_base_model().model)(x), ours)


def test_task_types_that_are_refused(vit: nn.Module, tmp_path: Path) -> None:
    backbone = FrozenBackbone.wrap(vit)
    tensors = filled(backbone, LoRA(rank=2))
    with pytest.raises(UnknownName, match="unknown task type 'CAUSAL'; did you mean 'CAUSAL_LM'"):
        export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone, task_type="CAUSAL")
    with pytest.raises(ConfigError, match=r"not known what that calls the encoder.*prefix="):
        export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone, task_type="SEQ_CLS")
    assert not (tmp_path / "a").exists()
    folder = export_peft(tmp_path / "a", tensors, LoRA(rank=2), backbone, prefix="trunk")
    assert json.loads((folder / CONFIG).read_text())["target_modules"][0] == "trunk.blocks.0.attn.qkv"


# --- PEFT's here ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "targets", "blocks"),
    [
        ("Llama", {"target_modules": ["q_proj", "v_proj"]}, ("query", "value"), {0, 1}),
        ("Llama", {"target_modules": "all-linear"}, TARGETS["Llama"], {0, 1}),
        ("Llama", {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]}, ("key", "down"), {1}),
        ("GPT2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ("query", "key", "value"), {0, 1}),
        ("GPT2", {"target_modules": "all-linear"}, TARGETS["GPT2"], {0, 1}),
        ("Bert", {"target_modules": ["query", "value"], "bias": "none"}, ("query", "value"), {0, 1}),
        ("Bert", {"target_modules": r".*layer\.1\..*dense"}, ("output", "up", "down"), {1}),
    ],
)
def test_an_adapter_trained_in_a_model_with_a_head(
    peft: Any, family: str, options: dict[str, Any], targets: Any, blocks: set[int], tmp_path: Path
) -> None:
    model, backbone = parts(family)
    causal = {} if family == "Bert" else {"task_type": "CAUSAL_LM"}
    theirs = trained(peft, model, tmp_path, r=3, lora_alpha=5, **options, **causal)
    found = import_peft(tmp_path, backbone)
    assert found.adapter == LoRA(rank=3, targets=targets)
    sites = {site for kind in targets for site in backbone.sites(kind)}
    assert {key.rpartition("/")[0] for key in found.tensors} == {site.name for site in sites if site.block in blocks}
    assert close(adapted(model, backbone, found.adapter, found.tensors), theirs)


def trained(peft: Any, model: Any, folder: Path, **options: Any) -> Tensor:
    """Logits of a copy of the model with an adapter that PEFT trained a step, and saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inside = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
        optimizer = torch.optim.SGD([value for value in inside.parameters() if value.requires_grad], lr=1.0)
        for _ in range(2):  # B is 0 before the first step, so A moves in the second
            optimizer.zero_grad()
            inside(**dict(inputs(model))).logits.square().mean().backward()
            optimizer.step()
    assert not close(logits(inside), logits(model)), "it has learned something"
    inside.save_pretrained(folder)
    return logits(inside)


def test_shared_keys_have_their_own_width(peft: Any, tmp_path: Path) -> None:
    """Four queries on two keys: B of key and value is half as high."""
    model, backbone = parts("Llama")
    trained(peft, model, tmp_path, r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    tensors = import_peft(tmp_path, backbone).tensors
    heights = {kind: tensors[f"layers.0.{kind}/B"].shape[0] for kind in ("query", "key", "value")}
    assert heights == {"query": 32, "key": 16, "value": 16}


def test_what_has_not_moved_yet_is_kept(peft: Any, tmp_path: Path) -> None:
    """B = 0 leaves out a third of a fused projection, which PEFT cannot leave out, but no layer that was named."""
    backbone, adapter = FrozenBackbone.wrap(llama()), LoRA(rank=2, targets=("query", "value"))
    tensors = {key: value * (not key.endswith("query/B")) for key, value in filled(backbone, adapter).items()}
    back = import_peft(export_peft(tmp_path / "a", tensors, adapter, backbone), backbone)
    assert back.adapter == adapter
    assert all(torch.equal(back.tensors[key], tensors[key]) for key in tensors)


@FAMILIES
def test_an_adapter_of_peft_joins_a_pool(peft: Any, family: str, tmp_path: Path) -> None:
    """Trained there, found and used from the pool here, beside one of ours."""
    encoder = MAKE[family]()
    theirs = folder_of_peft(peft, encoder, tmp_path / "peft", r=2, target_modules="all-linear")
    backbone, x = FrozenBackbone.wrap(copy.deepcopy(encoder)), inputs(encoder)
    found = import_peft(tmp_path / "peft", backbone)
    ours = filled(backbone, found.adapter)
    pool = AdapterPool.create(tmp_path / "pool", backbone)
    pool.add(found.tensors, found.adapter, [PoolClass(label=0)], id="theirs")
    pool.add(ours, found.adapter, [PoolClass(label=1)], id="ours")
    again = AdapterPool(tmp_path / "pool", backbone=FrozenBackbone.wrap(copy.deepcopy(encoder)))
    assert close(features(again.backbone, found.adapter, dict(again.tensors("theirs")), x), theirs)
    bank = AdapterBank(again.backbone, found.adapter)
    slots = [bank.add_slot(again.tensors(id)) for id in ("theirs", "ours")]
    with torch.no_grad(), bank.route(Route.hard(torch.tensor([slots[0], slots[1], slots[0]]))):
        mixed = again.backbone(x)
    alone = features(backbone, found.adapter, ours, x)
    assert close(mixed, torch.stack([theirs[0], alone[1], theirs[2]]))


def test_layers_of_two_encoders(peft: Any, tmp_path: Path) -> None:
    """A model with two towers has two layers that may be ours."""
    two = nn.ModuleDict({"image": llama(), "text": llama()})
    peft.get_peft_model(two, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleBackbone, match=r"'image.layers.* and 'text.layers.*different encoders"):
        import_peft(tmp_path, FrozenBackbone.wrap(llama()))


def test_a_head_is_refused(peft: Any, tmp_path: Path) -> None:
    model, backbone = parts("Llama")
    trained(peft, model, tmp_path, r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(StorageError, match=r"lm_head.*Heads \(modules_to_save\) must stay out"):
        import_peft(tmp_path, backbone)
