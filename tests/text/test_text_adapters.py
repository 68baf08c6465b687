"""Adapters on text models: padding, half precision, prefixes inside the attention, and what is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.tokens import NO_TOKEN
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import IncompatibleBackbone

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, NO_TOKEN, NO_TOKEN], [13, 14, 15, 16, NO_TOKEN]])


def make(name: str, **options: Any) -> nn.Module:
    """A tiny model of random weights."""
    sizes = GPT2 if name == "GPT2" else TEXT | ({"ffn_dim": 48, "word_embed_proj_dim": 32} if name == "OPT" else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(**{**sizes, **options})
        )
        for parameter in model.parameters():  # large enough that every term is felt
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


def filled(backbone: FrozenBackbone, adapter: AdapterType, slots: int = 2, size: float = 0.5) -> AdapterBank:
    bank = AdapterBank(backbone, adapter)
    for slot in range(slots):
        generator = torch.Generator().manual_seed(slot)
        fresh = bank.fresh(generator)
        bank.add_slot({key: size * torch.randn(value.shape, generator=generator) for key, value in fresh.items()})
    return bank


def left(tokens_BN: Tensor) -> Tensor:
    """The same texts with their padding on the left."""
    return torch.stack([torch.cat([row[row < 0], row[row >= 0]]) for row in tokens_BN])


FAMILIES = ["Bert", "DistilBert", "MPNet", "DebertaV2", "ModernBert", "GPT2", "Llama", "Gemma2", "Phi", "Phi3", "OPT"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "bottleneck": {"type": "bottleneck", "scale": 1.0},
    "Houlsby": {"type": "bottleneck", "place": "both", "mode": "sequential", "scale": 1.0},
    "LoRA": {"type": "lora", "targets": ["value", "output", "down"]},
    "prefix": {"type": "prefix"},
}
NO_PREFIX = ("MPNet", "DebertaV2")


def options_of(name: str) -> dict[str, Any]:
    return {
        "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2},
    }.get(name, {})


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_makes_no_difference(name: str, kind: str) -> None:
    """The same answers alone, in a batch, padded left and right; each text with its own adapter or none."""
    backbone, adapter = FrozenBackbone.wrap(make(name, **options_of(name))), adapter_from(ADAPTERS[kind])
    if kind == "prefix" and name in NO_PREFIX:
        with pytest.raises(IncompatibleBackbone, match=r"no sites of kind 'attention'; it has: .*ffn_parallel"):
            AdapterBank(backbone, adapter)
        return
    bank, slots = filled(backbone, adapter), torch.tensor([1, -1, 0])
    plain = backbone.features(IDS)
    wide = torch.cat([IDS, torch.full((3, 2), NO_TOKEN)], 1)
    with bank.route(Route.hard(slots)):
        batch = backbone.features(IDS)
        for other in (wide, left(IDS), left(wide)):
            assert torch.allclose(backbone.features(other), batch, atol=1e-5)
    for i, slot in enumerate(slots.tolist()):
        with bank.route(Route.single(slot)):
            alone = backbone.features(IDS[i : i + 1, : int((IDS[i] >= 0).sum())])
        assert torch.allclose(batch[i], alone[0], atol=1e-5)
        assert ((batch[i] - plain[i]).abs().max() > 1e-3) == (slot >= 0)
    assert torch.equal(backbone.features(IDS), plain)


@pytest.mark.parametrize("name", ["Bert", "Llama", "OPT"])
@pytest.mark.parametrize("kind", ["bottleneck", "LoRA", "prefix"])
def test_routers_and_watchers_see_the_mean_over_the_tokens(name: str, kind: str) -> None:
    """[B, 1, D], the same for a text alone and in a padded batch; so is what a router makes of it."""
    backbone = FrozenBackbone.wrap(make(name))
    bank = filled(backbone, adapter_from(ADAPTERS[kind]))

    def route() -> dict[str, Route]:
        def router(x_BND: Tensor) -> Tensor:
            assert x_BND.shape[1] == 1
            return torch.softmax(x_BND.mean(1)[:, :2] * 3, 1)

        return {site.name: Route.mixed((0, 1), router) for site in bank.sites}

    def run(tokens_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        with bank.route(route(), watch=lambda site, x_BND: seen.update({site: x_BND})):
            return backbone.features(tokens_BN), seen

    features, seen = run(IDS)
    assert set(seen) == {site.name for site in bank.sites}
    for i in range(len(IDS)):
        alone, own = run(IDS[i : i + 1, : int((IDS[i] >= 0).sum())])
        assert torch.allclose(alone[0], features[i], atol=1e-5)
        for site, x_BND in own.items():
            assert x_BND.shape == (1, 1, x_BND.shape[-1])
            assert torch.allclose(x_BND[0], seen[site][i], atol=1e-5)


@pytest.mark.parametrize("kind", ["bottleneck", "LoRA", "prefix"])
def test_adapters_are_float32_in_a_backbone_of_half_precision(kind: str) -> None:
    full = FrozenBackbone.wrap(make("Llama"))
    half = FrozenBackbone.wrap(make("Llama").to(torch.bfloat16))
    changes = []
    for backbone in (full, half):
        bank = filled(backbone, adapter_from(ADAPTERS[kind]))
        with bank.route(Route.single(1)):
            features = backbone.features(IDS)
        features.float().square().sum().backward()
        for key, parameter in bank.named_slot(1):
            assert parameter.dtype == torch.float32, key
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.any(), key
        changes.append((features - backbone.features(IDS)).detach().float())
    assert half.encoder.dtype == torch.bfloat16
    assert (changes[0] - changes[1]).norm() < 0.1 * changes[0].norm()


# --- prefixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Phi", "Qwen3"])
def test_a_plain_prefix_is_keys_and_values_in_front(name: str, attention: str) -> None:
    """Without compensation and scales: what transformers computes with a filled cache in front of the tokens."""
    model = make(
        name, attn_implementation=attention, **({"head_dim": 8, "num_key_value_heads": 4} if name == "Qwen3" else {})
    )
    backbone = FrozenBackbone.wrap(model)
    bank = filled(backbone, adapter_from({"type": "prefix", "length": 3, "learn_scale": False, "compensate": False}))
    ids, mask = IDS.clamp_min(0), (IDS >= 0).long()
    cache, exported = transformers.DynamicCache(), bank.export(1)
    for layer, site in enumerate(bank.sites):
        pair = [exported[f"{site.name}/{part}"].transpose(0, 1).expand(3, -1, -1, -1) for part in ("key", "value")]
        cache.update(*pair, layer)
    places = torch.arange(5).expand(3, -1)
    with torch.no_grad():
        whole = torch.cat([torch.ones(3, 3, dtype=torch.long), mask], 1)
        wanted = model(
            input_ids=ids, attention_mask=whole, position_ids=places, past_key_values=cache
        ).last_hidden_state
        with bank.route(Route.single(1)):
            found = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
        plain = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
    real = mask.bool()
    assert torch.allclose(found[real], wanted[real], atol=2e-5)
    assert not torch.allclose(plain[real], wanted[real], atol=1e-2)


def test_the_compensated_prefix_has_mass_one() -> None:
    """LAE: rows of the attention sum to 2 - lambda, so a prefix of values 0 only takes weight, by the same formula."""
    backbone = FrozenBackbone.wrap(make("Llama"))
    outputs = []
    for compensate in (False, True):
        bank = filled(backbone, adapter_from({"type": "prefix", "learn_scale": False, "compensate": compensate}), 1)
        with torch.no_grad():
            for key, value in bank.named_slot(0):
                if key.endswith("/value"):
                    value.zero_()
        with bank.route(Route.single(0)):
            outputs.append(backbone.features(IDS))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[0], backbone.features(IDS), atol=1e-3)


def test_share_of_a_prefix_where_logits_are_capped() -> None:
    """Capped to almost nothing all logits are 0, so the n-th token gives P keys of 0 the share P / (P + n)."""
    options = {"attn_logit_softcapping": 1e-4, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager"}
    model: Any = make("Gemma2", **options)
    bank = filled(
        FrozenBackbone.wrap(model), adapter_from({"type": "prefix", "length": 3, "compensate": False}), 1, 0.0
    )
    seen: list[Tensor] = []
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for route in (None, Route.single(0)):
        with bank.route(route), torch.no_grad():
            model(input_ids=IDS[:1], use_cache=False)
    n = torch.arange(1, 6).reshape(1, 5, 1)
    assert torch.allclose(seen[1], seen[0] * n / (n + 3), atol=1e-4)


def test_eager_and_sdpa_agree_also_with_windows_caps_and_grouped_keys() -> None:
    options = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 2}
    for name in ("Gemma3Text", "Mistral"):
        features = []
        for attention in ("sdpa", "eager"):
            backbone = FrozenBackbone.wrap(make(name, attn_implementation=attention, **options))
            with filled(backbone, adapter_from("prefix")).route(Route.single(1)):
                features.append(backbone.features(IDS))
        assert torch.allclose(features[0], features[1], atol=1e-5), name


def test_attention_is_left_as_it_was() -> None:
    """No name and no function stays behind: not after a pass, not after an error, not in other models."""
    config = transformers.LlamaConfig(**TEXT)
    torch.manual_seed(0)
    twins = [transformers.LlamaModel(config) for _ in range(2)]
    first, second = (FrozenBackbone.wrap(model) for model in twins)
    bank = filled(first, adapter_from("prefix"))
    others = second.features(IDS)
    attention: Any = twins[0].layers[0].self_attn
    plain, before = first.features(IDS), dict(vars(attention))
    with bank.route(Route.single(0)):
        first.features(IDS)
        assert torch.equal(second.features(IDS), others)
        assert config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError):
            attention(torch.zeros(1, 2, 7))
        assert config._attn_implementation == "sdpa"
    assert vars(attention).keys() == before.keys()
    assert torch.equal(first.features(IDS), plain)


def test_two_banks_of_prefixes_and_a_copy() -> None:
    backbone = FrozenBackbone.wrap(make("Llama"))
    one, two = filled(backbone, adapter_from("prefix")), filled(backbone, adapter_from("prefix"))
    with one.route(Route.single(0)):
        first = backbone.features(IDS)
        with two.route(Route.single(1)):
            both = backbone.features(IDS)
        assert torch.equal(backbone.features(IDS), first)
    assert not torch.allclose(first, both, atol=1e-3)
    twin, bank = copy.deepcopy((backbone, one))
    with torch.no_grad():
        for parameter in bank.slot_parameters(0):
            parameter.add_(1)
    with bank.route(Route.single(0)), one.route(Route.single(0)):
        assert not torch.allclose(twin.features(IDS), first, atol=1e-3)
        assert torch.equal(backbone.features(IDS), first)


def test_prefix_needs_an_attention_with_its_mask() -> None:
    model: Any = make("Llama")
    bank = filled(FrozenBackbone.wrap(model), adapter_from("prefix"))
    model.config._attn_implementation_internal = "flash_attention_2"
    with (
        bank.route(Route.single(0)),
        pytest.raises(IncompatibleBackbone, match="attn_implementation 'eager' or 'sdpa'"),
    ):
        model.layers[0].self_attn(torch.zeros(1, 2, 32))


def test_houlsby_has_two_adapters_per_block() -> None:
    bank = filled(FrozenBackbone.wrap(make("Llama")), adapter_from(ADAPTERS["Houlsby"]))
    assert [site.name for site in bank.sites] == ["layers.0.attn", "layers.0.ffn", "layers.1.attn", "layers.1.ffn"]
    one = adapter_from(ADAPTERS["Houlsby"] | {"place": "ffn"})
    assert len(AdapterBank(FrozenBackbone.wrap(make("Llama")), one).sites) == 2
