"""Known structures of transformers that read text. One row per family, read by :mod:`cl_adapters.sites.families`.

Sites lie at norms, linear layers and dropouts: transformers calls these with one tensor and gets one tensor, while
whole attentions take keywords and return tuples. Module names are those of transformers 5, and mostly of version 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_adapters.sites.places import (
    GATED_LAYERS,
    MLP_LAYERS,
    branches,
    fused_qkv,
    input_width_of,
    inside,
    linear,
    norm,
    post_norm,
    pre_norm,
    projections,
    unscaled,
)
from cl_adapters.sites.sites import Family, Tap

_OPT_ROWS = Tap("self_attn_layer_norm", "in")
_BERT_PARTS = ("attention.output.dropout", "intermediate.dense", "output.dense", "output.dropout")
_BERT_LAYERS = linear(output="attention.output.dense", up="intermediate.dense", down="output.dense")
_LLAMA_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def _shared_keys(block: nn.Module) -> bool:
    """DeBERTa with positions that share the projections of query and key, which then run twice."""
    attention: Any = block.get_submodule("attention.self")
    return bool(getattr(attention, "share_att_key", False)) and bool(getattr(attention, "relative_attention", False))


TEXT_ENCODERS: tuple[Family, ...] = (
    # BERT, RoBERTa, ELECTRA: LayerNorm(dropout(dense(intermediate h)) + h)
    Family(
        name="transformers BERT",
        blocks="encoder.layer",
        parts=("attention.self.query", *_BERT_PARTS),
        places=post_norm(
            "attention",
            linear(query="attention.self.query", key="attention.self.key", value="attention.self.value")
            | inside("attention.self", "attention.output.dense")
            | _BERT_LAYERS,
        ),
    ),
    Family(
        name="transformers DeBERTa-v2",
        blocks="encoder.layer",
        parts=("attention.self.query_proj", *_BERT_PARTS),
        places=post_norm(
            "attention",
            linear(
                query="attention.self.query_proj",
                key="attention.self.key_proj",
                fits=lambda block: not _shared_keys(block),
            )
            | linear(value="attention.self.value_proj")
            | _BERT_LAYERS,
        ),
    ),
    # query, key and value lie head by head in one projection, not as [q | k | v]
    Family(
        name="transformers DeBERTa",
        blocks="encoder.layer",
        parts=("attention.self.in_proj", *_BERT_PARTS),
        places=post_norm("attention", _BERT_LAYERS),
    ),
    Family(
        name="transformers MPNet",
        blocks="encoder.layer",
        parts=("attention.attn.q", "attention.dropout", "intermediate.dense", "output.dense", "output.dropout"),
        places=post_norm(
            "attention",
            linear(query="attention.attn.q", key="attention.attn.k", value="attention.attn.v")
            | _BERT_LAYERS
            | linear(output="attention.attn.o"),
            attn_end="attention.dropout",
            norms=("attention.LayerNorm", "output.LayerNorm"),
        ),
    ),
    # version 4 calls the attention with keywords, so its input is read at a projection
    Family(
        name="transformers DistilBERT",
        blocks="transformer.layer",
        parts=("attention.q_lin", "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
        places=post_norm(
            "attention.q_lin",
            linear(query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", output="attention.out_lin")
            | inside("attention", "attention.out_lin")
            | linear(up="ffn.lin1", down="ffn.lin2"),
            attn_end="attention.out_lin",
            ffn="ffn",
            ffn_end="ffn",
            norms=("sa_layer_norm", "output_layer_norm"),
        ),
    ),
    # the first block has no norm before its attention, but an nn.Identity in its place
    Family(
        name="transformers ModernBERT",
        blocks="layers",
        parts=("attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"),
        places=pre_norm(
            ("attn_norm", "attn.Wo"),
            ("mlp_norm", "mlp"),
            input_width_of("mlp.Wi"),
            fused_qkv("attn.Wqkv", "attn.Wo") | inside("attn", "attn.Wo") | linear(output="attn.Wo", down="mlp.Wo"),
        ),
    ),
)

TEXT_DECODERS: tuple[Family, ...] = (
    Family(
        name="transformers GPT-2",
        blocks="h",
        parts=("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        places=pre_norm(
            ("ln_1", "attn.c_proj"),
            ("ln_2", "mlp"),
            input_width_of("mlp.c_fc"),
            fused_qkv("attn.c_attn", "attn.c_proj")
            | inside("attn", "attn.c_proj")
            | linear(output="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
        ),
        fits=unscaled("ln_1", "attn", "ln_2", "mlp"),
    ),
    # Gemma 2 and 3: a second norm at the end of each branch
    Family(
        name="transformers Gemma, norms before and after",
        blocks="layers",
        parts=(*_LLAMA_CHILDREN, "pre_feedforward_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
        places=pre_norm(
            ("input_layernorm", "post_attention_layernorm"),
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            input_width_of("mlp.up_proj"),
            projections("self_attn") | GATED_LAYERS,
        ),
        fits=unscaled(*_LLAMA_CHILDREN, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    # query, key and value in one projection; not in equal parts where several queries share a key
    Family(
        name="transformers Phi-3",
        blocks="layers",
        parts=(*_LLAMA_CHILDREN, "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        places=pre_norm(
            ("input_layernorm", "self_attn.o_proj"),
            ("post_attention_layernorm", "mlp"),
            input_width_of("mlp.gate_up_proj"),
            fused_qkv("self_attn.qkv_proj", "self_attn.o_proj")
            | inside("self_attn", "self_attn.o_proj")
            | linear(output="self_attn.o_proj", down="mlp.down_proj"),
        ),
        fits=unscaled(*_LLAMA_CHILDREN),
    ),
    # Llama, Mistral, Qwen 2 and 3, Gemma: h = x + attn(norm x); h + mlp(norm h)
    Family(
        name="transformers Llama",
        blocks="layers",
        parts=(*_LLAMA_CHILDREN, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
        places=pre_norm(
            ("input_layernorm", "self_attn.o_proj"),
            ("post_attention_layernorm", "mlp"),
            input_width_of("mlp.up_proj"),
            projections("self_attn") | GATED_LAYERS,
        ),
        fits=unscaled(*_LLAMA_CHILDREN),
    ),
    # attention and feed-forward network side by side behind one norm: x + attn(norm x) + mlp(norm x)
    Family(
        name="transformers Phi",
        blocks="layers",
        parts=("input_layernorm", "self_attn.q_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2", "resid_dropout"),
        places=branches(
            input_width_of("mlp.fc1"),
            attn=(Tap("input_layernorm", "out"), Tap("self_attn.dense", "out")),
            ffn=(Tap("input_layernorm", "in"), Tap("mlp", "out")),
            block=Tap("input_layernorm", "in"),
            inner=False,  # what the norm puts out belongs to both
        )
        | norm("attn", "input_layernorm")
        | projections("self_attn", "dense")
        | MLP_LAYERS,
        fits=unscaled("input_layernorm", "self_attn", "mlp"),
    ),
    # OPT, with its tokens in one row in the feed-forward network; the 350M model has its norms elsewhere
    Family(
        name="transformers OPT",
        blocks="decoder.layers",
        parts=("self_attn_layer_norm", "self_attn.out_proj", "final_layer_norm", "fc1", "fc2"),
        places=pre_norm(
            ("self_attn_layer_norm", "self_attn.out_proj"),
            ("final_layer_norm", "fc2"),
            input_width_of("fc1"),
            projections("self_attn", "out_proj") | linear(up="fc1", down="fc2", rows=_OPT_ROWS),
            rows=_OPT_ROWS,
        ),
        fits=lambda block: bool(getattr(block, "do_layer_norm_before", False)),
    ),
)
