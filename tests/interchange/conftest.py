"""LoRA in two libraries: small encoders of three kinds, random adapters, and what PEFT computes with them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.adapters.lora import Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs
from cl_adapters.bank.bank import AdapterBank, Route

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "cl_adapters.json"
ALL: tuple[Target, ...] = ("query", "key", "value")


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs peft: pip install cl-adapters[test]")


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> nn.Module:
    return tiny_vit(depth=2)


def made(cls: str, config: str, options: dict[str, Any], **arguments: Any) -> Any:
    """A model of transformers with random weights, of which none vanishes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install cl-adapters[text]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**options), **arguments)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
LLAMA = BERT | {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def bert() -> Any:
    return made("BertModel", "BertConfig", BERT, add_pooling_layer=False)


def llama() -> Any:
    """Two queries share a key."""
    return made("LlamaModel", "LlamaConfig", LLAMA)


def gpt2() -> Any:
    """Layers are Conv1D, and query, key and value are thirds of one."""
    return made("GPT2Model", "GPT2Config", GPT2)


def with_head(family: str) -> Any:
    """LlamaForCausalLM, GPT2LMHeadModel or BertForMaskedLM."""
    cls = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}[family]
    options: dict[str, Any] = {"Llama": LLAMA, "GPT2": GPT2, "Bert": BERT}[family]
    return made(cls, f"{family}Config", options)


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
