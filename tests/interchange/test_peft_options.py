"""Configurations of PEFT as options of ours: the same layers, rank, scale and dropout, or a refusal by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.adapters.base import adapter_from
from cl_adapters.adapters.lora import LoRA, Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import ConfigError, IncompatibleBackbone, StorageError
from cl_adapters.interchange import lora_from_peft
from cl_adapters.strategies.mos import MOS, MOSConfig
from tests.interchange.conftest import bert, close, features, filled, gpt2, inputs, llama, made

MAKE = {"Llama": llama, "GPT-2": gpt2, "BERT": bert}
QV = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ATTENTION: tuple[Target, ...] = ("query", "key", "value")
EVERY: tuple[Target, ...] = (*ATTENTION, "output", "up", "gate", "down")
NO_GATE = tuple(kind for kind in EVERY if kind != "gate")


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return FrozenBackbone.wrap(llama())


CONFIGURATIONS = [
    pytest.param("Llama", {"target_modules": ["q_proj", "v_proj"]}, ("query", "value"), None, id="names"),
    pytest.param("Llama", {"target_modules": "all-linear"}, EVERY, None, id="Llama, all"),
    pytest.param("GPT-2", {"target_modules": "all-linear"}, NO_GATE, None, id="GPT-2, all"),
    pytest.param("BERT", {"target_modules": "All-Linear"}, NO_GATE, None, id="BERT, all"),
    pytest.param("GPT-2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ATTENTION, None, id="fused"),
    pytest.param("GPT-2", {"target_modules": ["c_proj"]}, ("output", "down"), None, id="one name, two layers"),
    pytest.param("GPT-2", {"target_modules": ["mlp.c_proj"]}, ("down",), None, id="the end of a name"),
    pytest.param("BERT", {"target_modules": ["query"], "layers_to_transform": [1]}, ("query",), (1,), id="layers"),
    pytest.param(
        "BERT", {"target_modules": ["query"], "layers_to_transform": [0, 1]}, ("query",), None, id="all layers"
    ),
    pytest.param(
        "Llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        ("query",),
        (0,),
        id="a layer behind a pattern",
    ),
    pytest.param(
        "Llama", {"target_modules": r"layers\.\d\.mlp\.(up|gate)_proj"}, ("up", "gate"), None, id="expression"
    ),
    pytest.param(
        "Llama",
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        ("query", "key", "value", "output"),
        None,
        id="all but an expression",
    ),
    pytest.param(
        "Llama",
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        ("query",),
        (1,),
        id="all but a name",
    ),
    pytest.param("Llama", {"target_modules": None}, ("query", "value"), None, id="PEFT's choice for Llama"),
    pytest.param("GPT-2", {"target_modules": None}, ATTENTION, None, id="PEFT's choice for GPT-2"),
]


@pytest.mark.parametrize(("family", "options", "targets", "blocks"), CONFIGURATIONS)
def test_the_layers_that_peft_adapts(
    peft: Any, family: str, options: dict[str, Any], targets: Any, blocks: Any
) -> None:
    """Also the same number of them, as PEFT counts; and ours compute something there."""
    encoder = MAKE[family]()
    theirs = peft.get_peft_model(copy.deepcopy(encoder), peft.LoraConfig(r=2, **options))
    adapted = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    backbone = FrozenBackbone.wrap(encoder)
    found = lora_from_peft(peft.LoraConfig(r=2, **options), backbone)
    assert (found["adapter"].targets, found["blocks"]) == (targets, blocks)
    bank = AdapterBank(backbone, **found)
    assert {site.target.module for site in bank.sites} == adapted
    tensors = filled(backbone, found["adapter"], None if blocks is None else list(blocks))
    with torch.no_grad():
        assert not close(features(backbone, found["adapter"], tensors, inputs(encoder)), backbone(inputs(encoder)))


@pytest.mark.parametrize(
    ("options", "targets", "blocks"),
    [
        ({"target_modules": ["model.layers.1.mlp.down_proj"]}, ("down",), (1,)),
        ({"target_modules": r"model\.layers\..*\.k_proj"}, ("key",), None),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ("query",), (1,)),
    ],
)
def test_names_in_a_model_with_a_head(
    peft: Any, backbone: FrozenBackbone, options: dict[str, Any], targets: Any, blocks: Any
) -> None:
    """PEFT itself finds them in LlamaForCausalLM only, and so a configuration for that is taken for the encoder."""
    found = lora_from_peft(peft.LoraConfig(task_type="CAUSAL_LM", **options), backbone)
    assert (found["adapter"].targets, found["blocks"]) == (targets, blocks)


def test_thirds_of_a_vision_transformer(vit: nn.Module) -> None:
    found = lora_from_peft(QV | {"target_modules": ["qkv"]}, FrozenBackbone.wrap(vit))
    assert found == {"adapter": LoRA(rank=4, targets=ATTENTION, scale=2.0), "blocks": None}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LoRA(rank=4, targets=("query", "value"), scale=2.0)),
        ({"use_rslora": True}, LoRA(rank=4, targets=("query", "value"), scale=4.0)),
        ({"lora_dropout": 0.25, "lora_alpha": 2}, LoRA(rank=4, targets=("query", "value"), scale=0.5, dropout=0.25)),
        ({"init_lora_weights": True, "bias": "none"}, LoRA(rank=4, targets=("query", "value"), scale=2.0)),
    ],
)
def test_rank_scale_and_dropout(
    peft: Any, backbone: FrozenBackbone, options: dict[str, Any], expected: LoRA, tmp_path: Path
) -> None:
    """The same from an object, a mapping, a file and a folder."""
    config = peft.LoraConfig(**{key: value for key, value in (QV | options).items() if key != "peft_type"})
    config.save_pretrained(tmp_path)
    forms = (config, QV | options, tmp_path, str(tmp_path / "adapter_config.json"))
    assert all(lora_from_peft(form, backbone) == {"adapter": expected, "blocks": None} for form in forms)
    theirs = peft.get_peft_model(llama(), config).base_model.model.layers[0].self_attn.q_proj
    assert theirs.scaling["default"] == expected.scale


def test_a_strategy_takes_the_options() -> None:
    backbone = FrozenBackbone.wrap(llama())
    strategy = MOS(model=backbone, evaluator=None, **lora_from_peft(QV | {"layers_to_transform": [1]}, backbone))
    assert strategy.config.adapter == LoRA(rank=4, targets=("query", "value"), scale=2.0)
    assert strategy.config.blocks == (1,)
    assert {site.name for site in strategy.model.bank.sites} == {"layers.1.query", "layers.1.value"}


def test_without_a_backbone_the_way_is_said(peft: Any) -> None:
    for config in (peft.LoraConfig(target_modules=["q_proj"]), QV):
        with pytest.raises(ConfigError, match=r"names layers of one backbone.*lora_from_peft\(config, backbone\)"):
            adapter_from(config)
        with pytest.raises(ConfigError, match="lora_from_peft"):
            MOSConfig(adapter=adapter_from(config))


@pytest.mark.parametrize(
    ("start", "scheme"), [(True, "kaiming"), (None, "kaiming"), ("Gaussian", "gaussian"), (False, "random")]
)
def test_start_values_are_drawn_as_peft_draws_them(
    peft: Any, backbone: FrozenBackbone, start: Any, scheme: Any
) -> None:
    """The same spread of A and of B, and the same bound of both where they are uniform."""
    config = QV | {"r": 8, "init_lora_weights": start}
    adapter = lora_from_peft(config, backbone)["adapter"]
    assert adapter == LoRA(rank=8, targets=("query", "value"), scale=1.0, init_scheme=scheme)
    bank = AdapterBank(backbone, adapter)
    draws = [bank.fresh(torch.Generator().manual_seed(seed)) for seed in range(20)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"r": 8, "target_modules": ["q_proj", "v_proj"]} | (
            {} if start is None else {"init_lora_weights": start}
        )
        theirs = [peft.get_peft_model(llama(), peft.LoraConfig(**options)).state_dict() for _ in range(20)]
    for ours, name in (("A", "lora_A"), ("B", "lora_B")):
        mine = torch.cat([value.flatten() for draw in draws for key, value in draw.items() if key.endswith(f"/{ours}")])
        other = torch.cat([value.flatten() for state in theirs for key, value in state.items() if name in key])
        assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.03), ours
        assert float(mine.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.3), ours
        assert (mine == 0).all() == (other == 0).all()


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "uses use_dora=True; .*set use_dora=False"),
        ({"modules_to_save": ["lm_head"]}, r"uses modules_to_save=\['lm_head'\]; .*heads are kept beside"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern=.*one rank"),
        ({"alpha_pattern": {"q_proj": 2}}, "uses alpha_pattern=.*one lora_alpha"),
        ({"bias": "lora_only"}, "uses bias='lora_only'.*bias=\"none\""),
        ({"lora_bias": True}, "uses lora_bias=True"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"trainable_token_indices": [3]}, "uses trainable_token_indices"),
        ({"target_parameters": ["w"]}, "uses target_parameters"),
        ({"new_in_the_next_version": 1}, "uses new_in_the_next_version=1; .*leave it out"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only LORA.*peft.convert_to_lora"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it changes the weights of the backbone"),
        ({"init_lora_weights": "olora"}, "changes the weights"),
        ({"init_lora_weights": "eva"}, "adapters cannot start so here.*True, False or 'gaussian'.*import_peft"),
        ({"init_lora_weights": []}, "changes the weights"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": True}, "r must be a whole number"),
        ({"target_modules": []}, "target_modules must be names"),
        ({"target_modules": 3}, "target_modules must be names"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "names 'lm_head'; .* has no such layer; LoRA knows its q_proj, k_proj",
        ),
        ({"target_modules": "(q_proj"}, "target_modules is no regular expression"),
        ({"exclude_modules": "(q_proj"}, "exclude_modules is no regular expression"),
        ({"target_modules": r"h\..*"}, "has no such layer"),
        ({"layers_to_transform": [7]}, "with the options beside it; .* has no such layer"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            "layers_to_transform needs target_modules as a list",
        ),
    ],
)
def test_what_cannot_be_honoured(backbone: FrozenBackbone, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_from_peft(QV | change, backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["mlp"]}, "means 'layers.0.mlp' of .*no place for an adapter.*Name it in exclude_modules"),
        ({"target_modules": ["embed_tokens"]}, "means 'embed_tokens' of .*no place for an adapter"),
        (
            {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
            "other layers in one block than in",
        ),
    ],
)
def test_layers_that_are_no_sites(backbone: FrozenBackbone, change: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleBackbone, match=message):
        lora_from_peft(QV | change, backbone)


def test_a_linear_layer_beside_the_blocks() -> None:
    """BERT's pooler is a linear layer to PEFT, and no site: it is named, and can be excluded."""
    options = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pooling = FrozenBackbone.wrap(made("BertModel", "BertConfig", options | {"intermediate_size": 48}))
    config = QV | {"target_modules": "all-linear"}
    with pytest.raises(IncompatibleBackbone, match=r"means 'pooler.dense' of"):
        lora_from_peft(config, pooling)
    found = lora_from_peft(config | {"exclude_modules": ["pooler.dense"]}, pooling)
    assert found["adapter"].targets == NO_GATE


@pytest.mark.parametrize("change", [{"lora_alpha": "8"}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.5}])
def test_numbers_out_of_range(backbone: FrozenBackbone, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be"):
        lora_from_peft(QV | change, backbone)


def test_what_is_no_configuration(backbone: FrozenBackbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a configuration of PEFT.*got 3"):
        lora_from_peft(3, backbone)
    with pytest.raises(StorageError, match="is missing"):
        lora_from_peft(tmp_path, backbone)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="peft_type None"):
        lora_from_peft(tmp_path, backbone)
