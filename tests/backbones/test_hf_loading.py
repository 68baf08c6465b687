"""Backbones of transformers from folders: texts, images, lengths, heads, precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_adapters.backbones import hf_load as hf_source
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.errors import BackboneUnavailable, ClAdaptersError, ConfigError
from tests.backbones.conftest import DECODERS, IMAGES, PATCHES, SIZES, TEXTS, model_of, tokenizer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "ModernBERT", "GPT-2", "Llama", "Gemma 3"])
def test_load_a_folder_of_texts(family: str, folder: Callable[..., Path]) -> None:
    backbone = FrozenBackbone.load(f"hf:{folder(family)}")
    assert backbone.pooling == ("last" if family in DECODERS else "mean")
    preprocessing = backbone.preprocessing
    assert isinstance(preprocessing, TextPreprocessing)
    features = backbone.features(preprocessing.encode(TEXTS))
    assert features.shape == (4, 32)
    one_by_one = [backbone.features(preprocessing.eval_transform(16)(text)[None]) for text in TEXTS]
    assert torch.allclose(torch.cat(one_by_one), features, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(("family", "suffix"), [("BERT", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_heads_are_left_out_and_nothing_is_random(family: str, suffix: str, folder: Callable[..., Path]) -> None:
    """A masked language model has no weights for the pooler: it must not be another one in every process."""
    first, second = (FrozenBackbone.load(f"hf:{folder(family, suffix)}") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert not [name for name in first.encoder.state_dict() if "pooler" in name or "head" in name]


def test_default_length_is_what_the_model_takes(folder: Callable[..., Path]) -> None:
    def length(family: str, **options: Any) -> int:
        preprocessing = FrozenBackbone.load(f"hf:{folder(family)}", **options).preprocessing
        assert isinstance(preprocessing, TextPreprocessing)
        return preprocessing.max_length

    assert length("BERT") == 24
    assert length("RoBERTa") == 22, "its positions begin behind the id of empty places"
    assert length("GPT-2") == hf_source.LONGEST
    assert length("BERT", max_length=9) == 9
    longest = "red " * 50
    for family in ("BERT", "RoBERTa"):
        backbone = FrozenBackbone.load(f"hf:{folder(family)}")
        assert backbone.features(backbone.preprocessing.encode([longest])).isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", IMAGES)
def test_load_a_folder_of_images(family: str, folder: Callable[..., Path]) -> None:
    path = folder(family)
    processors = {
        "ViT": transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=2),
        "DINOv2": transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        "CLIP": transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "SigLIP": transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
    }
    processors[family].save_pretrained(path)
    backbone = FrozenBackbone.load(f"hf:{path}")
    recipe = backbone.preprocessing
    assert isinstance(recipe, Preprocessing)
    assert recipe.input_size == (3, 16, 16)
    assert recipe.crop_pct == (0.8 if family == "DINOv2" else 1.0)
    assert recipe.interpolation == ("bilinear" if family == "ViT" else "bicubic")
    assert recipe.mean == pytest.approx(processors[family].image_mean)
    assert backbone.pooling == ("mean" if family == "SigLIP" else "cls")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = backbone.encoder(pixel_values=x).last_hidden_state
    theirs = hidden.mean(1) if family == "SigLIP" else hidden[:, 0]
    assert torch.allclose(backbone.features(x), theirs, atol=1e-6)
    larger = FrozenBackbone.load(f"hf:{path}", img_size=24)
    assert larger.preprocessing is not None and larger.fingerprint != backbone.fingerprint
    assert larger.features(torch.randn(2, 3, 24, 24)).isfinite().all()
    with pytest.raises(ClAdaptersError, match=r"takes images \[B, 3, 24, 24\]"):
        larger.features(x)
    larger.check_resumable()
    with pytest.raises(ConfigError, match="only texts have a length"):
        FrozenBackbone.load(f"hf:{path}", max_length=4)


def test_the_vision_tower_of_a_folder_with_two(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config=SIZES | {"projection_dim": 8}, vision_config=PATCHES | {"projection_dim": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    backbone = FrozenBackbone.load(f"hf:{tmp_path}")
    assert backbone.num_features == 32
    assert not [name for name in backbone.encoder.state_dict() if "token_embedding" in name]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = model.eval().vision_model(pixel_values=x).last_hidden_state[:, 0]
    assert torch.allclose(backbone.features(x), theirs, atol=1e-6)


def test_spectrograms(tmp_path: Path) -> None:
    sizes = {key: value for key, value in PATCHES.items() if key != "image_size"}
    sizes |= {"frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    model_of("AST", sizes).save_pretrained(tmp_path)
    backbone = FrozenBackbone.load(f"hf:{tmp_path}")
    assert backbone.preprocessing is None and backbone.pooling == "cls"
    x_BTF = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone.resume(backbone.enter(x_BTF, 1), 1), backbone.features(x_BTF))


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_float32_features(dtype: str, folder: Callable[..., Path]) -> None:
    full, half = (FrozenBackbone.load(f"hf:{folder('Llama')}", dtype=name) for name in (None, dtype))
    assert {str(value.dtype) for value in half.encoder.parameters()} == {f"torch.{dtype}"}
    x = full.preprocessing.encode(TEXTS)  # type: ignore[union-attr]
    features = half.features(x)
    assert features.dtype == torch.float32
    assert torch.cosine_similarity(features, full.features(x)).min() > 0.99
    h = half.enter(x, 1)
    assert h.dtype == torch.float32 and torch.equal(half.resume(h, 1), features)
    assert half.fingerprint != full.fingerprint


def test_auto_is_recorded_as_what_it_was(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    backbone = FrozenBackbone.load(f"hf:{folder('BERT')}", dtype="auto")
    assert backbone.source["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert FrozenBackbone.load(**backbone.source).fingerprint == backbone.fingerprint
    assert FrozenBackbone.load(f"hf:{folder('BERT')}", dtype="auto").source["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "packages"), [("int8", "bitsandbytes or torchao or optimum-quanto"), ("nf4", "bitsandbytes")]
)
def test_quantisation_without_a_package(
    name: str, packages: str, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_source, "_installed", lambda package: False)
    with pytest.raises(BackboneUnavailable, match=f"needs the package {packages}, and none is installed"):
        FrozenBackbone.load(f"hf:{folder('BERT')}", quantization=name)
