"""Known structures of transformers that read images or spectrograms: one row per family and major version.

Read by :mod:`cl_adapters.sites.families`. What is said there of hooks at norms and linear layers holds here too.
"""

from __future__ import annotations

from cl_adapters.sites.places import (
    GATED_LAYERS,
    MLP_LAYERS,
    input_width_of,
    linear,
    pre_norm,
    projections,
    unscaled,
    width_of,
)
from cl_adapters.sites.sites import Family, Place

_VIT_LAYERS_4 = linear(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
)


def _vit(version: str, blocks: str, attention: dict[str, Place]) -> Family:
    """ViT and AST."""
    output = attention["output"].target.module
    five = version == "5"
    layers = MLP_LAYERS if five else linear(up="intermediate.dense", down="output.dense")
    up, down = layers["up"].target.module, layers["down"].target.module
    return Family(
        name=f"transformers {version} ViT",
        blocks=blocks,
        parts=("layernorm_before", output, "layernorm_after", up, down),
        places=pre_norm(
            ("layernorm_before", output), ("layernorm_after", down), input_width_of(up), attention | layers
        ),
    )


def _dinov2(version: str, attention: dict[str, Place], mlp: dict[str, Place]) -> Family:
    """DINOv2, with an MLP or with SwiGLU."""
    output, down = attention["output"].target.module, mlp["down"].target.module
    return Family(
        name=f"transformers {version} DINOv2",
        blocks="encoder.layer",
        parts=("norm1", output, "layer_scale1", "norm2", down, "layer_scale2"),
        places=pre_norm(
            ("norm1", "layer_scale1"), ("norm2", "layer_scale2"), width_of("norm2.weight"), attention | mlp
        ),
    )


def _clip(blocks: str) -> Family:
    """CLIP and SigLIP, either tower."""
    return Family(
        name="transformers CLIP",
        blocks=blocks,
        parts=("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        places=pre_norm(
            ("layer_norm1", "self_attn.out_proj"),
            ("layer_norm2", "mlp"),
            input_width_of("mlp.fc1"),
            projections("self_attn", "out_proj") | MLP_LAYERS,
        ),
        fits=unscaled("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    )


VISION_TRANSFORMERS: tuple[Family, ...] = (
    _vit("5", "layers", projections("attention")),
    _vit("4", "encoder.layer", _VIT_LAYERS_4),
    _dinov2("5", projections("attention"), MLP_LAYERS),
    _dinov2("5", projections("attention"), GATED_LAYERS),
    _dinov2("4", _VIT_LAYERS_4, MLP_LAYERS),
    _dinov2("4", _VIT_LAYERS_4, linear(down="mlp.weights_out")),
    _clip("encoder.layers"),
    _clip("vision_model.encoder.layers"),
    _clip("text_model.encoder.layers"),
)
