"""Structures of transformers: those that look alike and are not, and the module names of version 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.families import find_family


def make(name: str, **options: Any) -> nn.Module:
    """A tiny model of random weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 50,
    }
    special = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        config = getattr(transformers, f"{name}Config")(**{**sizes, **special, **options})
        model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


def test_arrangements_that_look_alike_are_refused() -> None:
    """Same parts, but a branch is scaled or has one more norm: adapters would add something else."""
    for name in ("Granite", "Glm4"):
        model = make(name, **({"head_dim": 8, "num_key_value_heads": 2} if name == "Glm4" else {}))
        with pytest.raises(IncompatibleBackbone, match="no known adapter sites"):
            find_family(model)
    with pytest.raises(IncompatibleBackbone, match="no known adapter sites"):
        find_family(make("OPT", ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False))


class _Old(nn.Module):
    """Modules of a block as version 4 of transformers names them."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        for path in paths:
            module: nn.Module = self
            *above, last = path.split(".")
            for step in above:
                if step not in dict(module.named_children()):
                    module.add_module(step, nn.Module())
                module = module.get_submodule(step)
            module.add_module(last, nn.LayerNorm(8) if "norm" in last else nn.Linear(8, 8))


VIT_4 = [f"attention.attention.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]


@pytest.mark.parametrize(
    ("blocks", "paths", "family"),
    [
        (
            "encoder.layer",
            [*VIT_4, "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"],
            "4 ViT",
        ),
        ("encoder.layer", [*VIT_4, "norm1", "layer_scale1", "norm2", "layer_scale2", "mlp.fc1", "mlp.fc2"], "4 DINOv2"),
        (
            "vision_model.encoder.layers",
            [
                *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")),
                "layer_norm1",
                "layer_norm2",
                "mlp.fc1",
                "mlp.fc2",
            ],
            "CLIP",
        ),
    ],
)
def test_names_of_version_4(blocks: str, paths: list[str], family: str) -> None:
    encoder = nn.Module()
    *above, last = blocks.split(".")
    module = encoder
    for step in above:
        module.add_module(step, nn.Module())
        module = module.get_submodule(step)
    module.add_module(last, nn.ModuleList(_Old(*paths) for _ in range(2)))
    found = find_family(encoder)
    assert found.name.endswith(family)
    for kind in ("attn_parallel", "ffn_sequential", "block_parallel", "query", "value", "output", "up", "down"):
        assert [site.width for site in found.sites(encoder, kind)] == [8, 8]
