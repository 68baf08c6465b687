"""Tiny backbones of every family, with inputs that they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs

IMAGE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**IMAGE, "num_classes": 0, **options})


def _deit_distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**IMAGE, num_classes=0)


def _swiglu() -> nn.Module:
    from timm.layers import SwiGLUPacked

    return _vit(reg_tokens=4, no_embed_class=True, init_values=1e-5, mlp_layer=SwiGLUPacked, mlp_ratio=4)


def _res_post() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return _vit(block_fn=ResPostBlock, init_values=0.5)


def _eva(**options: Any) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**{**IMAGE, "num_classes": 0, "use_rot_pos_emb": True, "init_values": 0.1, **options})


def _beit(**options: Any) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**IMAGE, num_classes=0, use_abs_pos_emb=False, init_values=0.1, **options)


def _rel_pos(res_post: bool) -> nn.Module:
    from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos

    return VisionTransformerRelPos(**IMAGE, num_classes=0, block_fn=ResPostRelPosBlock if res_post else RelPosBlock)


def _xcit() -> nn.Module:
    from timm.models.xcit import Xcit

    return Xcit(**IMAGE, num_classes=0, cls_attn_layers=1, eta=0.5)


def _hiera() -> nn.Module:
    from timm.models.hiera import Hiera

    sizes: dict[str, Any] = {"img_size": (32, 32), "embed_dim": 16, "num_heads": 1, "stages": (1, 1), "q_pool": 1}
    return Hiera(**sizes, mask_unit_size=(4, 4), mask_unit_attn=(True, False), num_classes=0)


def _sam() -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    windows: dict[str, Any] = {"window_size": 3, "global_attn_indexes": (1,), "use_rel_pos": True, "neck_chans": 16}
    return VisionTransformerSAM(**{**IMAGE, "img_size": 32}, **windows, num_classes=0)


def _naflex() -> nn.Module:
    naflexvit = pytest.importorskip("timm.models.naflexvit", reason="newer timm")
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (2, 2)}
    model: nn.Module = naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**sizes, global_pool="avg"), num_classes=0)
    return model


def _swin(img_size: int, patch_size: int, window_size: int) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    sizes: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "window_size": window_size}
    return SwinTransformer(**sizes, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=0)


def _convnext(conv_mlp: bool) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    sizes: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 16), "patch_size": 2}
    return ConvNeXt(**sizes, conv_mlp=conv_mlp, ls_init_value=0.5, num_classes=0)


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
APART: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
PATCHES: dict[str, Any] = SIZES | {"image_size": 16, "patch_size": 8}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", TEXT),
    "DistilBERT": ("DistilBert", {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "MPNet": ("MPNet", TEXT),
    "DeBERTa": ("Deberta", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DeBERTa-v2": ("DebertaV2", TEXT | APART | {"conv_kernel_size": 3}),
    "DeBERTa-v3": ("DebertaV2", TEXT | APART | {"share_att_key": True, "position_biased_input": False}),
    "ModernBERT": (
        "ModernBert",
        TEXT
        | {
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
        },
    ),
    "GPT-2": (
        "GPT2",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Llama": ("Llama", GROUPED),
    "Mistral: sliding window": ("Mistral", GROUPED | {"sliding_window": 3}),
    "Qwen2": ("Qwen2", {**GROUPED, "head_dim": None}),
    "Qwen3": ("Qwen3", GROUPED),
    "Gemma": ("Gemma", GROUPED),
    "Gemma 2": ("Gemma2", GROUPED | {"sliding_window": 3}),
    "Gemma 3": ("Gemma3Text", GROUPED | {"sliding_window": 3}),
    "Phi": ("Phi", TEXT),
    "Phi-3": ("Phi3", TEXT | {"pad_token_id": 0}),
    "Phi-3, grouped keys": ("Phi3", TEXT | {"pad_token_id": 0, "num_key_value_heads": 2}),
    "OPT": ("OPT", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "transformers ViT": ("ViT", PATCHES),
    "transformers DINOv2": ("Dinov2", PATCHES | {"layerscale_value": 0.5}),
    "transformers DINOv2, SwiGLU": ("Dinov2", PATCHES | {"use_swiglu_ffn": True}),
    "transformers CLIP": ("CLIPVision", PATCHES),
    "transformers SigLIP": ("SiglipVision", PATCHES),
    "transformers AST": (
        "AST",
        SIZES | {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 16, "num_mel_bins": 16},
    ),
}
"""Class of the model (and of its config) in transformers, and the sizes of a tiny one."""


def _transformers(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    name, sizes = TRANSFORMERS[family]
    given = {key: value for key, value in sizes.items() if value is not None}
    model: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**given))
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT": _vit,
    "ViT with a classifier": lambda: _vit(num_classes=5),
    "ViT, other sizes": lambda: _vit(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, qkv_bias=False),
    "ViT, mean pooling, no class token": lambda: _vit(global_pool="avg", class_token=False),
    "DeiT distilled": _deit_distilled,
    "DINOv2: LayerScale, registers": lambda: _vit(init_values=1e-5, reg_tokens=4, no_embed_class=True),
    "DINOv2 giant: SwiGLU": _swiglu,
    "CLIP: norm before the blocks": lambda: _vit(pre_norm=True),
    "SigLIP: attention pooling": lambda: _vit(global_pool="map", class_token=False),
    "drop path while training": lambda: _vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5),
    "ViT, residual post-norm": _res_post,
    "ViT, normed queries and keys": lambda: _vit(qk_norm=True),
    "ViT, normed attention": lambda: _vit(scale_attn_norm=True),
    "EVA: rotary, SwiGLU": partial(_eva, swiglu_mlp=True, scale_mlp=True),
    "EVA, post-norm": partial(_eva, use_rot_pos_emb=False, use_post_norm=True, init_values=None),
    "EVA, one projection without a bias": partial(_eva, qkv_bias=False),
    "EVA, three projections": partial(_eva, qkv_fused=False),
    "BEiT: relative positions": partial(_beit, use_rel_pos_bias=True),
    "BEiT: shared relative positions, no bias": partial(_beit, use_shared_rel_pos_bias=True, qkv_bias=False),
    "relative positions": lambda: _rel_pos(False),
    "relative positions, residual post-norm": lambda: _rel_pos(True),
    "XCiT: attention over channels": _xcit,
    "Hiera: fewer and wider tokens": _hiera,
    "SAM: windows and a neck": _sam,
    "NaFlexViT": _naflex,
    "Swin: shifted windows": lambda: _swin(16, 2, 4),
    "Swin: padded windows": lambda: _swin(24, 4, 4),
    "ConvNeXt": lambda: _convnext(False),
    "ConvNeXt, MLP of convolutions": lambda: _convnext(True),
    **{family: partial(_transformers, family) for family in TRANSFORMERS},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A backbone of one family, with inputs that it takes."""

    family: str
    backbone: FrozenBackbone

    @property
    def is_text(self) -> bool:
        """Whether it reads token ids."""
        return self.family in TRANSFORMERS and not self.family.startswith("transformers")

    def inputs(self, n: int, seed: int = 0) -> Inputs:
        """Images float32 [n, 3, H, W]; for text, token ids int64 [n, 7] with masks of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_text:
            lengths = 2 + torch.arange(n) % 6
            ids = torch.randint(3, 50, (n, 7), generator=generator)
            return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}
        if self.family.endswith("AST"):
            return torch.randn(n, 16, 16, generator=generator)
        sides = {"ViT, other sizes": 24, "Swin: padded windows": 24, "Hiera: fewer and wider tokens": 32}
        side = sides.get(self.family, 32 if self.family.startswith(("SAM", "ConvNeXt")) else 16)
        return torch.randn(n, 3, side, side, generator=generator)


def draw_(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter from the seed, so that no term is zero by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return module


def case_of(family: str) -> Case:
    """A fresh tiny backbone of that family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = FAMILIES[family]()
    return Case(family, FrozenBackbone.wrap(draw_(module, 1)))
