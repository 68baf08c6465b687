"""The head of a causal language model of transformers, put on the encoder of a loaded backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.hf_forward import dtype_of, is_causal, modality_of
from cl_adapters.backbones.hf_load import asked, loading_arguments, quiet, transformers_library
from cl_adapters.errors import ConfigError, IncompatibleBackbone


def open_language_model(backbone: FrozenBackbone) -> nn.Module:
    """The causal language model whose encoder is that of ``backbone``: the same module, not a copy.

    The head comes from the place that the backbone came from. The whole model is read for it, and its own encoder is
    dropped at once: for that moment the memory holds the weights twice.

    Args:
        backbone: of :meth:`FrozenBackbone.load` with a name "hf:...".

    Returns:
        A frozen model in evaluation mode, which generates greedily until one of the folder's end tokens.

    Raises:
        ConfigError: the backbone was not loaded from transformers.
        IncompatibleBackbone: no decoder of texts, or a file without the weights of a head.
        BackboneUnavailable: the files cannot be had here.
    """
    prefix, _, place = str(backbone.source.get("name", "")).partition(":")
    if prefix != "hf":
        raise ConfigError(
            f'a language model needs a backbone loaded as "hf:FOLDER_OR_NAME", but {backbone.name!r} has no such source'
        )
    encoder: Any = backbone.encoder
    if modality_of(encoder) != "text" or not is_causal(encoder):
        raise IncompatibleBackbone(
            f"{backbone.name!r} ({type(encoder).__name__}) is no causal language model: its tokens see those after "
            "them, or it takes no texts; choose a decoder (GPT-2, Llama, Mistral, Qwen, Gemma, Phi, OPT, ...)"
        )
    lm, missing = _read(place, dtype_of(encoder))
    if type(lm.base_model) is not type(encoder):
        raise IncompatibleBackbone(
            f"{backbone.name!r}: its language model is built on {type(lm.base_model).__name__}, the backbone is "
            f"{type(encoder).__name__}; models of several kinds of input are not supported here"
        )
    if missing:
        raise IncompatibleBackbone(
            f"{place} does not hold the weights of the head of {type(lm).__name__}: missing {missing[:3]}; save the "
            "model with its head (AutoModelForCausalLM), not the encoder alone"
        )
    setattr(lm, lm.base_model_prefix, encoder)
    if getattr(lm.config, "tie_word_embeddings", False):
        lm.get_output_embeddings().weight = encoder.get_input_embeddings().weight
    frozen: nn.Module = lm.requires_grad_(False).eval().to(backbone.device)
    return frozen


def generation_options(
    lm: Any, *, max_new_tokens: int, num_beams: int, end: list[int], fill: int, use_cache: bool
) -> Any:
    """The library's own configuration of generation, with nothing of a folder's sampling habits.

    ``end``: ids of the tokens that end an answer; ``fill``: the id at empty places.
    """
    made = type(lm.generation_config)(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=end or None,
        pad_token_id=fill,
    )
    # newer versions take what is left out from here
    lm.generation_config = type(lm.generation_config)(eos_token_id=lm.generation_config.eos_token_id)
    return made


def _read(place: str, dtype: Any) -> tuple[Any, list[str]]:
    """The whole language model, and the weights that its files do not have."""
    library = transformers_library()
    arguments = loading_arguments(library, dtype)
    with quiet(library):
        lm, report = asked(place, lambda: library.AutoModelForCausalLM.from_pretrained(place, **arguments))
    return lm, sorted(report["missing_keys"])
