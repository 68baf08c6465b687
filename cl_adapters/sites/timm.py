"""Known structures of timm: which has which sites. One row per family, read by :mod:`cl_adapters.sites.families`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cl_adapters.sites.places import branches, linear, norm, width_of
from cl_adapters.sites.sites import Family, Place, Sizes, Tap


def _whole(block: nn.Module) -> bool:
    """Whether the attention sees and returns all tokens of an image.

    Not so in Hiera, whose blocks may change width and number of tokens, nor in SAM, whose windows are cut in the block.
    """
    widths = {block.get_parameter(f"{norm}.weight").numel() for norm in ("norm1", "norm2")}
    window: Any = getattr(block, "window_size", None) or 0
    return len(widths) == 1 and not any(window if isinstance(window, (tuple, list)) else [window])


def _fused_attention(*, windows: bool = False) -> dict[str, Place]:
    """LoRA sites on timm's fused qkv projection (its output is [q | k | v])."""

    def called(block: nn.Module) -> bool:
        # BEiT and EVA compute with qkv.weight without calling the module, so a hook would never run
        attn: Any = block.get_submodule("attn")
        without_call = getattr(attn, "q_bias", None) is not None and not getattr(attn, "qkv_bias_separate", False)
        return isinstance(getattr(attn, "qkv", None), nn.Linear) and not without_call and (windows or _whole(block))

    def sizes(block: nn.Module) -> Sizes:
        qkv: Any = block.get_submodule("attn.qkv")
        return Sizes(qkv.in_features, qkv.out_features // 3)

    read, add = Tap("attn.qkv", "in"), Tap("attn.qkv", "out")
    return {
        kind: Place(read, add, kind, sizes, called, qkv_part=part, windows=windows, layout="tokens")
        for part, kind in enumerate(("query", "key", "value"))
    }


def _prefix_attention() -> dict[str, Place]:
    """Plain softmax attention: what is added is added to the heads' output, before its projection."""

    def plain(block: nn.Module) -> bool:
        attn: Any = block.get_submodule("attn")
        return (
            type(attn).__name__ == "Attention"
            and _takes_only_tokens(attn.forward)  # no rotation, no bias of positions
            and {name.partition(".")[0] for name, _ in attn.named_parameters()} == {"qkv", "proj"}  # no norms, no gate
            and attn.qkv.out_features == 3 * attn.proj.in_features
            and attn.scale == (attn.proj.in_features // attn.num_heads) ** -0.5
            and _whole(block)
        )

    def sizes(block: nn.Module) -> Sizes:
        attn: Any = block.get_submodule("attn")
        return Sizes(attn.qkv.out_features, attn.proj.in_features, attn.num_heads)

    return {"attention": Place(Tap("attn.qkv", "out"), Tap("attn.proj", "in"), "attention", sizes, plain)}


def _plain_mlp(block: nn.Module) -> bool:
    """One layer up and one down; in timm's GluMlp and SwiGLU the first layer holds a gate too."""
    return type(block.get_submodule("mlp")).__name__ == "Mlp"


def _takes_only_tokens(forward: Callable[..., Any]) -> bool:
    """Whether ``forward`` depends on its first input only; timm's masks stay None in what we call."""
    return set(list(inspect.signature(forward).parameters)[1:]) <= {"attn_mask", "is_causal"}


def _resumes_timm(encoder: Any) -> bool:
    """Whether the features are norm(blocks(x)) as in timm's plain ViT.

    EVA gives its blocks a rotation, BEiT a bias, NaFlexViT and XCiT more: blocks alone would give other features.
    """
    forward = getattr(getattr(encoder, "forward_features", None), "__func__", None)
    plain = getattr(forward, "__qualname__", "") == "VisionTransformer.forward_features"
    return plain and all(_takes_only_tokens(block.forward) for block in encoder.blocks)


def _resume_timm(encoder: Any, h_BND: Tensor, block: int) -> Tensor:
    for module in encoder.blocks[block:]:
        h_BND = module(h_BND)
    features: Tensor = encoder.forward_head(encoder.norm(h_BND), pre_logits=True)
    return features


_ATTN_END, _FFN_END = Tap("drop_path1", "out"), Tap("drop_path2", "out")
_VIT_PARTS = ("norm1", "attn", "norm2", "mlp", "drop_path1", "drop_path2")
_MLP = linear(up="mlp.fc1", fits=_plain_mlp) | linear(down="mlp.fc2")
_NORM2 = width_of("norm2.weight")
_MAP = width_of("conv_dw", "out_channels")


def _same_size(block: nn.Module) -> bool:
    """A ConvNeXt block that does not change its map."""
    return isinstance(block.get_submodule("shortcut"), nn.Identity)


def _channels_last(block: nn.Module) -> bool:
    """A ConvNeXt block whose norm sees [B, H, W, D]; with an MLP of convolutions it sees a map."""
    return not getattr(block, "use_conv_mlp", False)


def _vit(name: str, *, attn: Tap, ffn: Tap, block: Tap, refuses: tuple[str, ...] = ()) -> Family:
    """A plain ViT with these inputs of its branches and blocks."""
    places = branches(_NORM2, attn=(attn, _ATTN_END), ffn=(ffn, _FFN_END), block=block, whole=_whole)
    places |= (
        norm("attn", "norm1")
        | norm("ffn", "norm2")
        | _fused_attention()
        | _prefix_attention()
        | linear(output="attn.proj", fits=_whole)
        | _MLP
    )
    return Family(name, "blocks", _VIT_PARTS, places, refuses, resume=_resume_timm, resumes=_resumes_timm)


TIMM_FAMILIES: tuple[Family, ...] = (
    # Swin, V1: x + drop_path1(attn(norm1 x)); + drop_path2(mlp(norm2 x)); tokens lie on a grid [B, H, W, D], but in a
    # row in the feed-forward network
    Family(
        name="timm Swin",
        blocks="layers.*.blocks",
        parts=(*_VIT_PARTS, "attn.qkv"),
        places=branches(
            _NORM2,
            attn=(Tap("norm1", "out"), _ATTN_END),
            ffn=(Tap("norm2", "in"), _FFN_END),
            block=Tap("norm1", "in"),
            ffn_layout="tokens",
        )
        | norm("attn", "norm1")
        | norm("ffn", "norm2", layout="tokens")
        | _fused_attention(windows=True)
        | linear(output="attn.proj", windows=True)
        | _MLP,
        refuses=("SwinTransformerV2Block",),
        layout="grid",
    ),
    # ViT, DeiT, DINOv2, CLIP / SigLIP image towers, BEiT, EVA: x + drop_path2(ls2(mlp(norm2 x)))
    _vit(
        "timm ViT, pre-norm",
        attn=Tap("norm1", "out"),
        ffn=Tap("norm2", "in"),
        block=Tap("norm1", "in"),
        refuses=("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"),
    ),
    # residual post-norm: x + drop_path2(norm2(mlp x))
    _vit("timm ViT, residual post-norm", attn=Tap("attn", "in"), ffn=Tap("mlp", "in"), block=Tap("attn", "in")),
    # ConvNeXt: shortcut(x) + drop_path(gamma * mlp(norm(conv_dw x))); the "ffn" is what follows the convolution
    Family(
        name="timm ConvNeXt",
        blocks="stages.*.blocks",
        parts=("conv_dw", "norm", "mlp", "shortcut", "drop_path"),
        places={
            "ffn_parallel": Place(Tap("conv_dw", "out"), Tap("drop_path", "out"), "ffn", _MAP),
            "ffn_sequential": Place(Tap("drop_path", "out"), Tap("drop_path", "out"), "ffn", _MAP),
            "ffn_before": Place(Tap("conv_dw", "out"), Tap("conv_dw", "out"), "ffn", _MAP),
            "block_parallel": Place(Tap("conv_dw", "in"), Tap("drop_path", "out"), "block", _MAP, _same_size),
        }
        | norm("ffn", "norm", fits=_channels_last, layout="grid"),
        layout="map",
    ),
)
