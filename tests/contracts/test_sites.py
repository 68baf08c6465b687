"""Where adapters attach in every family: which kinds of sites it has, what they read, and where they add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.base import adapter_from
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.families import find_family
from tests.contracts.family_sites import AROUND, FFN, KINDS, LAYERS, LINEAR, NORMS, fitting, lacks_of, layout_of, routed


def seen_by(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[tuple[str, str], Tensor]:
    """First input and output of the named modules during ``run``; registered last, so after the bank's hooks."""
    seen: dict[tuple[str, str], Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name, "in"] = args[0].clone()
            seen[name, "out"] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_kinds_of_every_family(case: Any) -> None:
    """One site per block and kind, each with a name of its own; or a refusal that says what there is."""
    lacks = lacks_of(case.family)
    for kind in KINDS:
        if kind in lacks:
            with pytest.raises(IncompatibleBackbone, match=rf"no sites of kind '{kind}'; it has: .*ffn_parallel"):
                case.backbone.sites(kind)
            continue
        sites = case.backbone.sites(kind)
        assert [site.block for site in sites] == list(range(case.backbone.depth))
        assert len({site.name for site in sites}) == len(sites)
        assert {site.layout for site in sites} == {layout_of(case.family, kind)}
        assert {site.windows for site in sites} == {case.family.startswith("Swin") and kind in (*LINEAR, "output")}
        assert all(site.heads > 0 for site in sites) == (kind == "attention")
    with pytest.raises(IncompatibleBackbone, match="no sites of kind 'qkv'"):
        case.backbone.sites("qkv")


# --- where a site reads and adds ----------------------------------------------------------------------------

End = tuple[str, str]
BLOCK_IN, BLOCK_OUT = ("", "in"), ("", "out")
PRE_NORM: dict[str, tuple[End, End]] = {
    "ffn_parallel": (BLOCK_OUT, ("norm2", "in")),
    "ffn_sequential": (BLOCK_OUT, ("drop_path2", "out")),
    "ffn_before": (("norm2", "in"), ("norm2", "in")),
    "attn_parallel": (("norm2", "in"), ("norm1", "out")),
    "attn_sequential": (("norm2", "in"), ("drop_path1", "out")),
    "attn_before": (("attn", "in"), ("attn", "in")),
    "block_parallel": (BLOCK_OUT, BLOCK_IN),
}
POST_NORM = PRE_NORM | {
    "ffn_parallel": (BLOCK_OUT, ("mlp", "in")),
    "ffn_before": (("mlp", "in"), ("mlp", "in")),
    "attn_parallel": (("mlp", "in"), ("attn", "in")),
    "attn_sequential": (("mlp", "in"), ("drop_path1", "out")),
}
XCIT = PRE_NORM | {  # a third branch lies between the two
    "attn_parallel": (("norm3", "in"), ("norm1", "out")),
    "attn_sequential": (("norm3", "in"), ("drop_path1", "out")),
}
CONVNEXT = {
    "ffn_parallel": (BLOCK_OUT, ("conv_dw", "out")),
    "ffn_sequential": (BLOCK_OUT, ("drop_path", "out")),
    "ffn_before": (("norm", "in"), ("norm", "in")),
    "block_parallel": (BLOCK_OUT, BLOCK_IN),
}


def post_norm(norms: tuple[str, str], attn: str, ffn: str, into: str = "intermediate") -> dict[str, tuple[End, End]]:
    """norm(h + branch(h)), from the norms and the ends of the branches."""
    return {
        "attn_parallel": ((norms[0], "in"), BLOCK_IN),
        "attn_sequential": ((norms[0], "in"), (attn, "out")),
        "ffn_parallel": ((norms[1], "in"), (into, "in")),
        "ffn_sequential": ((norms[1], "in"), (ffn, "out")),
        "block_parallel": ((norms[1], "in"), BLOCK_IN),
    }


def pre_norm(norms: tuple[str, str], query: str, attn: str, ffn: str) -> dict[str, tuple[End, End]]:
    """h + branch(norm(h)), from the norms, the attention's first projection, and the ends of the branches."""
    return {
        "attn_parallel": ((norms[1], "in"), (norms[0], "out")),
        "attn_sequential": ((norms[1], "in"), (attn, "out")),
        "attn_before": ((query, "in"), (query, "in")),
        "ffn_parallel": (BLOCK_OUT, (norms[1], "in")),
        "ffn_sequential": (BLOCK_OUT, (ffn, "out")),
        "ffn_before": ((norms[1], "in"), (norms[1], "in")),
        "block_parallel": (BLOCK_OUT, BLOCK_IN),
    }


_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
BERT = post_norm(_BERT_NORMS, "attention.output.dropout", "output.dropout")
LLAMA = pre_norm(_LLAMA_NORMS, "self_attn.q_proj", "self_attn.o_proj", "mlp")
GEMMA = pre_norm(
    ("input_layernorm", "pre_feedforward_layernorm"),
    "self_attn.q_proj",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
PHI = {
    "attn_parallel": (BLOCK_OUT, ("input_layernorm", "out")),
    "attn_sequential": (BLOCK_OUT, ("self_attn.dense", "out")),
    "ffn_parallel": (BLOCK_OUT, BLOCK_IN),
    "ffn_sequential": (BLOCK_OUT, ("mlp", "out")),
    "block_parallel": (BLOCK_OUT, BLOCK_IN),
}
VIT = pre_norm(("layernorm_before", "layernorm_after"), "attention.q_proj", "attention.o_proj", "mlp")
CLIP = pre_norm(("layer_norm1", "layer_norm2"), "self_attn.q_proj", "self_attn.out_proj", "mlp")
DINO = pre_norm(("norm1", "norm2"), "attention.q_proj", "layer_scale1", "layer_scale2")
WIRING: dict[str, dict[str, tuple[End, End]]] = {
    "BERT": BERT,
    "DeBERTa": BERT,
    "DistilBERT": post_norm(("sa_layer_norm", "output_layer_norm"), "attention.out_lin", "ffn", "ffn"),
    "MPNet": post_norm(("attention.LayerNorm", "output.LayerNorm"), "attention.dropout", "output.dropout"),
    "ModernBERT": pre_norm(("attn_norm", "mlp_norm"), "attn.Wqkv", "attn.Wo", "mlp"),
    "GPT-2": pre_norm(("ln_1", "ln_2"), "attn.c_attn", "attn.c_proj", "mlp"),
    "Gemma 2": GEMMA,
    "Gemma 3": GEMMA,
    **dict.fromkeys(("Llama", "Mistral", "Qwen", "Gemma"), LLAMA),
    "Phi-3": pre_norm(_LLAMA_NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp"),
    "Phi": PHI,
    "OPT": pre_norm(("self_attn_layer_norm", "final_layer_norm"), "self_attn.q_proj", "self_attn.out_proj", "fc2"),
    **dict.fromkeys(("transformers ViT", "transformers AST"), VIT),
    "transformers DINOv2": DINO,
    **dict.fromkeys(("transformers CLIP", "transformers SigLIP"), CLIP),
    "XCiT": XCIT,
    "ConvNeXt": CONVNEXT,
}
"""Beginning of the family's name; the first that fits."""


def wiring(family: str) -> Mapping[str, tuple[End, End]]:
    """Per kind: (where the sum is seen, what is added there)."""
    for start, table in WIRING.items():
        if family.startswith(start):
            return table
    return POST_NORM if "post-norm" in family else PRE_NORM


@pytest.mark.parametrize("kind", [*AROUND, *FFN, "block_parallel"])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_reads_and_adds_where_the_papers_say(case: Any, kind: str, layout: str, echo_of: Any) -> None:
    """With h = x + A(x) after the attention, F the feed-forward branch: at each site exactly one term more.

    ffn_parallel h + F(h) + delta(h) (MOS, SEMA); attn_parallel x + A(x) + delta(norm x) (LAE); sequential: delta of
    what the branch puts out; before: the branch alone sees x + delta(x), the residual stream does not.
    """
    backbone, x, block = case.backbone, case.inputs(3), 1
    layer = find_family(backbone.encoder).find_blocks(backbone.encoder)[block][1]
    echo = echo_of(kind, layout)
    bank = fitting(case, echo, lambda: AdapterBank(backbone, echo, blocks=[block]))
    if bank is None:
        return
    bank.add_slot(bank.fresh(torch.Generator()))
    where, what = wiring(case.family)[kind]
    modules = {name: layer.get_submodule(name) for name in {where[0], what[0], ""}}
    plain = seen_by(modules, lambda: backbone.features(x))
    echoed = seen_by(modules, lambda: routed(bank, backbone, x, Route.single(0)))
    assert torch.equal(echoed[BLOCK_IN], plain[BLOCK_IN]), "blocks below are as they were"
    wanted = plain[where] + plain[what].reshape_as(plain[where])
    assert (echoed[where] - wanted).abs().max() < 2e-5
    assert (echoed[where] - plain[where]).abs().max() > 0.05
    if kind in ("attn_before", "ffn_before"):
        stream_is_kept(case, layer, kind, bank)


def stream_is_kept(case: Any, layer: nn.Module, kind: str, bank: AdapterBank) -> None:
    """What passes by the branch is as without the adapter."""
    branch = kind.replace("before", "sequential")
    after, (end, _) = wiring(case.family)[branch]
    modules = {name: layer.get_submodule(name) for name in (end, after[0])}
    backbone, x = case.backbone, case.inputs(3)
    plain = seen_by(modules, lambda: backbone.features(x))
    now = seen_by(modules, lambda: routed(bank, backbone, x, Route.single(0)))
    stream = [seen[after] - seen[end, "out"].reshape_as(seen[after]) for seen in (plain, now)]
    assert (stream[0] - stream[1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [*LINEAR, *LAYERS, "gate"])
def test_lora_sites_leave_the_other_thirds_alone(case: Any, kind: str) -> None:
    """Of a fused projection [q | k | v] exactly one third changes, by what is read times a matrix."""
    lora = adapter_from({"type": "lora", "targets": [kind], "rank": 2})
    bank = fitting(case, lora, lambda: AdapterBank(case.backbone, lora, blocks=[1]))
    if bank is None:
        return
    site, generator = bank.sites[0], torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(value.shape, generator=generator) for key, value in bank.fresh(generator).items()}
    bank.add_slot(tensors)
    modules = {"": case.backbone.encoder.get_submodule(site.target.module)}
    x = case.inputs(3)
    plain = seen_by(modules, lambda: case.backbone.features(x))
    now = seen_by(modules, lambda: routed(bank, case.backbone, x, Route.single(0)))
    A, B = tensors[f"{site.name}/A"], tensors[f"{site.name}/B"]
    places = [[*LINEAR, *LAYERS].index(kind)] if site.qkv_part is not None else [0]
    before_after = (seen[BLOCK_OUT].split(site.out_width, -1) for seen in (plain, now))
    for third, (before, after) in enumerate(zip(*before_after, strict=True)):
        if third in places:
            assert torch.allclose(after, before + plain[BLOCK_IN] @ A.mT @ B.mT, atol=1e-4)
            assert not torch.allclose(after, before, atol=1e-2)
        else:
            assert torch.equal(after, before)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_sites_scale_and_shift_what_the_norm_puts_out(case: Any, kind: str) -> None:
    """Of one block; and what follows is what a LayerNorm with the other weights gives."""
    tuning = adapter_from({"type": "ln_tuning", "place": kind.removesuffix("_norm")})
    bank = fitting(case, tuning, lambda: AdapterBank(case.backbone, tuning, blocks=[1]))
    if bank is None:
        return
    site, generator = bank.sites[0], torch.Generator().manual_seed(0)
    scale, shift = (0.3 * torch.randn(site.width, generator=generator) for _ in range(2))
    bank.add_slot({f"{site.name}/scale": scale, f"{site.name}/shift": shift})
    layer: Any = case.backbone.encoder.get_submodule(site.target.module)
    assert "Norm" in type(layer).__name__
    x, kept = case.inputs(3), list[Tensor]()
    plain = seen_by({"": layer}, lambda: case.backbone.features(x))[BLOCK_OUT]
    seen = seen_by({"": layer}, lambda: kept.append(routed(bank, case.backbone, x, Route.single(0))))[BLOCK_OUT]
    assert torch.allclose(seen, (1 + scale) * plain + shift, atol=1e-5)
    if not isinstance(layer, nn.LayerNorm) or layer.bias is None:
        return  # RMS norms have no shift
    with torch.no_grad():
        layer.weight.copy_((1 + scale) * layer.weight)
        layer.bias.copy_((1 + scale) * layer.bias + shift)
    assert torch.allclose(case.backbone.features(x), kept[0], atol=1e-4)


def test_prefix_sites_are_plain_attention(case: Any) -> None:
    """The formula rests on it: what the heads put out is softmax(q k^T / sqrt(hd)) v of the projection's output."""
    prefix = adapter_from("prefix")
    bank = fitting(case, prefix, lambda: AdapterBank(case.backbone, prefix))
    for site in bank.sites if bank is not None else ():
        if site.target.end == "inside":
            continue  # see test_text_adapters.py: compared with keys and values that transformers itself puts in front
        ends = {name: case.backbone.encoder.get_submodule(getattr(site, name).module) for name in ("source", "target")}
        seen = seen_by(ends, lambda: case.backbone.features(case.inputs(3)))
        q, k, v = seen["source", "out"].unflatten(-1, (3, site.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        assert torch.allclose(heads.transpose(1, 2).flatten(2), seen["target", "in"], atol=1e-5)
