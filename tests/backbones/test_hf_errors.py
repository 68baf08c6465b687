"""Backbones of transformers: what cannot be loaded or read is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import BackboneUnavailable, ClAdaptersError, ConfigError, DataError, IncompatibleBackbone
from tests.backbones.conftest import ENCODERS, TEXT, model_of

pytest.importorskip("transformers")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneUnavailable, match=r'pip install "cl-adapters\[text\]"'):
        FrozenBackbone.load("hf:bert-base-uncased")


def test_places_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneUnavailable, match=r"no folder .*nowhere"):
        FrozenBackbone.load(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(BackboneUnavailable, match=r"has no config\.json"):
        FrozenBackbone.load(f"hf:{tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneUnavailable, match=r"Without network, copy the model's files into a folder"):
        FrozenBackbone.load("hf:nobody/has-such-a-model")


def test_pickles_are_refused(tmp_path: Path) -> None:
    model_of(*ENCODERS["BERT"]).config.save_pretrained(tmp_path)
    with pytest.raises(BackboneUnavailable, match=r"has no \.safetensors file$"):
        FrozenBackbone.load(f"hf:{tmp_path}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(BackboneUnavailable, match=r"only pickles, which are never loaded .* convert it once: python"):
        FrozenBackbone.load(f"hf:{tmp_path}")


def test_weights_that_are_missing_are_named(tmp_path: Path, folder: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of(*ENCODERS["BERT"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layer.1." not in key}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleBackbone, match=r"does not hold the weights of BertModel: missing .*layer\.1\."):
        FrozenBackbone.load(f"hf:{tmp_path}")


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "GPT-2", "Llama"])
def test_no_tokenizer(family: str, tmp_path: Path) -> None:
    """Some versions of transformers make an empty one without a word."""
    model_of(*TEXT[family]).save_pretrained(tmp_path)
    with pytest.raises(BackboneUnavailable, match=r"no tokenizer can be loaded .* tokenizer\.save_pretrained"):
        FrozenBackbone.load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "unknown pooling 'max'; known: encoder, cls, mean, last"),
        ({"max_length": 25}, "max_length=25, but .* has 24 positions"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"quantization": "int2"}, "unknown quantization 'int2'; known: int8, nf4"),
        ({"img_size": 32}, "takes text"),
        ({"crop_pct": 0.5}, "takes no images"),
        ({"weights": "model.safetensors"}, "leave weights=.* out"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        FrozenBackbone.load(f"hf:{folder('BERT')}", **options)


@pytest.mark.parametrize(
    "options", [{"pooling": "mean"}, {"max_length": 5}, {"dtype": "auto"}, {"quantization": "int8"}]
)
def test_options_of_transformers_models_elsewhere(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is an option of transformers models"):
        FrozenBackbone.load("vit_glyph_tiny", **options)


def test_inputs_that_are_no_texts(bert: FrozenBackbone) -> None:
    with pytest.raises(DataError, match=r"row 1 of the batch has no token"):
        bert.features(torch.tensor([[1, 2], [-1, -1]]))
    with pytest.raises(DataError, match=r"takes token ids int64 \[B, N\], got torch.float32 \[2, 3\]"):
        bert.features(torch.zeros(2, 3))
    with pytest.raises(DataError, match=r"takes token ids"):
        bert.features(torch.tensor([1, 2]))
    with pytest.raises(DataError, match=r"token id 60, but .* knows the ids 0\.\.59"):
        bert.features(torch.tensor([[1, 60]]))
    with pytest.raises(DataError, match=r"a text of 25 tokens, but .* has 24 positions"):
        bert.features(torch.ones(1, 25, dtype=torch.long))
    x = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ClAdaptersError, match="nothing beside these"):
        bert.enter({"input_ids": x, "token_type_ids": x}, 1)


def test_an_own_module_with_integer_inputs_is_left_alone() -> None:
    """Minus one is no empty place there."""
    backbone = FrozenBackbone.wrap(nn.EmbeddingBag(5, 4), num_features=4)
    assert backbone.features(torch.tensor([[1, 2]])).shape == (1, 4)
    assert backbone.token_mask is None
