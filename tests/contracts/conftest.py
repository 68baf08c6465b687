"""What the contract tests share: variants of every adapter type, tiny backbones of every family, filled banks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.bank import AdapterBank
from cl_adapters.batches import Inputs


def variants(cls: type[AdapterType]) -> Iterator[tuple[str, AdapterType]]:
    """The type with its defaults, each of its choices one at a time, and all of them at once."""
    default: Any = cls()
    yield "default", default
    hints = get_type_hints(cls)
    last: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        hint = hints[field.name]
        options = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for option in options:
            if option != getattr(default, field.name):
                last[field.name] = option
                yield f"{field.name}={option}", dataclasses.replace(default, **{field.name: option})
    if len(last) > 1:
        yield "every other choice", dataclasses.replace(default, **last)


VARIANTS = [
    pytest.param(adapter, id=f"{name} {label}")
    for name in adapters.names()
    for label, adapter in variants(adapters.get(name))
]


@pytest.fixture(params=VARIANTS)
def adapter(request: pytest.FixtureRequest) -> AdapterType:
    """Every registered adapter type in every choice of its options."""
    chosen: AdapterType = request.param
    return chosen


# --- backbones ----------------------------------------------------------------------------------------------

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


def _eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**IMAGE, num_classes=0, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, init_values=0.1)


def _eva_post_norm() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**IMAGE, num_classes=0, use_post_norm=True)


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**IMAGE, num_classes=0, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)


def _rel_pos(res_post: bool) -> nn.Module:
    from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos

    return VisionTransformerRelPos(**IMAGE, num_classes=0, block_fn=ResPostRelPosBlock if res_post else RelPosBlock)


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
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
    "EVA: rotary, SwiGLU": _eva,
    "EVA, post-norm": _eva_post_norm,
    "BEiT: relative positions": _beit,
    "relative positions": lambda: _rel_pos(False),
    "relative positions, residual post-norm": lambda: _rel_pos(True),
    "BERT": _bert,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A backbone of one family, with inputs that it takes."""

    family: str
    backbone: FrozenBackbone

    def inputs(self, n: int, seed: int = 0) -> Inputs:
        """Images float32 [n, 3, H, W]; for text, token ids int64 [n, 7] with masks of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        if self.family == "BERT":
            lengths = 2 + torch.arange(n) % 6
            ids = torch.randint(1, 50, (n, 7), generator=generator)
            return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}
        side = 24 if "other sizes" in self.family else 16
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


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A fresh tiny backbone of every family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = FAMILIES[request.param]()
    return Case(request.param, FrozenBackbone.wrap(draw_(module, 1)))


Filled = Callable[..., AdapterBank]


@pytest.fixture
def filled() -> Filled:
    """Factory of banks with random adapters: ``filled(backbone, adapter, slots=3)``."""

    def make(backbone: FrozenBackbone, adapter: AdapterType, slots: int = 3, size: float = 0.3) -> AdapterBank:
        bank = AdapterBank(backbone, adapter)
        for slot in range(slots):
            generator = torch.Generator().manual_seed(100 + slot)
            tensors: dict[str, Tensor] = bank.fresh(generator)
            bank.add_slot({k: size * torch.randn(v.shape, generator=generator) for k, v in tensors.items()})
        return bank

    return make
