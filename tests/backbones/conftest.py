"""Backbones of transformers, one of every family: tiny, random, with weights so large that a leak of any kind shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.backbones.frozen import FrozenBackbone

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
BIASED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", SIZES),
    "RoBERTa": ("Roberta", SIZES | {"pad_token_id": 1, "bos_token_id": 0}),
    "DistilBERT": ("DistilBert", {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "MPNet": ("MPNet", SIZES | {"pad_token_id": 1}),
    "DeBERTa": ("Deberta", SIZES | BIASED),
    "DeBERTa-v3": ("DebertaV2", SIZES | BIASED | {"position_buckets": 4, "share_att_key": True}),
    "ModernBERT": (
        "ModernBert",
        SIZES | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Llama": ("Llama", GROUPED),
    "Mistral": ("Mistral", GROUPED | {"sliding_window": 3}),
    "Qwen2": ("Qwen2", {key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "Qwen3": ("Qwen3", GROUPED),
    "Gemma": ("Gemma", GROUPED),
    "Gemma 2": ("Gemma2", GROUPED | {"sliding_window": 3}),
    "Gemma 3": ("Gemma3Text", GROUPED | {"sliding_window": 3}),
    "Phi": ("Phi", SIZES),
    "Phi-3": ("Phi3", SIZES | {"pad_token_id": 0}),
    "OPT": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
TEXT = ENCODERS | DECODERS
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", PATCHES),
    "DINOv2": ("Dinov2", PATCHES),
    "CLIP": ("CLIPVision", PATCHES),
    "SigLIP": ("SiglipVision", PATCHES),
}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green", "blue", "sky", "grass", "the", "is", "not"]
TEXTS = ["the sky is blue", "grass", "the grass is not blue the grass is green", ""]


def model_of(name: str, sizes: dict[str, Any], suffix: str = "Model") -> Any:
    """A random model whose every weight matters."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install cl-adapters[text]")
    known = getattr(transformers, f"{name}Config", None)
    if known is None:
        pytest.skip(f"this version of transformers has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{suffix}")(known(**sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    return model


def tokenizer() -> Any:
    """One that knows ``WORDS``."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install cl-adapters[text]")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tool = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    tool.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tool, **names)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of folders with a model of a family, and a tokenizer where it takes texts."""
    made: dict[tuple[str, str], Path] = {}

    def build_folder(family: str, suffix: str = "Model") -> Path:
        if (family, suffix) not in made:
            path = made[family, suffix] = tmp_path_factory.mktemp("models")
            model_of(*(TEXT | IMAGES)[family], suffix=suffix).save_pretrained(path)
            if family in TEXT:
                tokenizer().save_pretrained(path)
        return made[family, suffix]

    return build_folder


@pytest.fixture
def bert(folder: Callable[..., Path]) -> FrozenBackbone:
    return FrozenBackbone.load(f"hf:{folder('BERT')}")


def tokens_of(lengths: list[int], width: int, side: str = "right", first: int = 3) -> Tensor:
    """Rows of the same tokens at one side of ``width`` columns."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.full((len(lengths), width), -1)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "middle": (width - length) // 2}[side]
        rows[row, start : start + length] = torch.randint(first, 60, (length,), generator=generator)
    return rows
