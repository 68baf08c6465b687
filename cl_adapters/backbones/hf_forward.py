"""How an encoder of transformers is called, and what is made of its answer. Nothing here imports transformers."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from cl_adapters.backbones.tokens import check_no_empty_text, mask_of, packed
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, IncompatibleBackbone

Pooling: TypeAlias = Literal["encoder", "cls", "mean", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
HALVES = (torch.float16, torch.bfloat16)
_NAMES = {"input_ids": "text", "pixel_values": "image", "input_values": "audio"}


def modality_of(encoder: nn.Module) -> str | None:
    """What an encoder of transformers takes: "text", "image" or "audio"; None: it is of another library."""
    if not hasattr(encoder, "config"):
        return None
    return _NAMES.get(str(getattr(encoder, "main_input_name", None)))


def call(encoder: nn.Module, x: Tensor, mask_BN: Tensor | None = None) -> Any:
    """The encoder's answer.

    Args:
        encoder: of transformers.
        x: packed tokens int64 [B, N] with their mask, bool [B, N]; or images [B, C, H, W], spectrograms [B, T, F].
        mask_BN: only for texts.

    Returns:
        An object with ``last_hidden_state`` [B, N, D].
    """
    config: Any = encoder.config
    kind: Any = type(encoder)  # for mypy, which takes no class for a key
    takes = _takes(kind)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if mask_BN is not None:
        # some models tell empty places by the id: RoBERTa, which counts positions without them
        ids_BN = x.masked_fill(~mask_BN, pad_token_of(encoder))
        return encoder(input_ids=ids_BN, attention_mask=mask_BN.long(), **options)
    if "interpolate_pos_encoding" in takes and image_side(config) not in (None, *x.shape[-1:]):
        options["interpolate_pos_encoding"] = True
    return encoder(**{str(encoder.main_input_name): x.to(dtype_of(encoder))}, **options)


def pad_token_of(encoder: nn.Module) -> int:
    """The id that stands at empty places: the one in the configuration where the model has a row for it, else 0.

    Some folders say -1, and some tokenizers were given a token for empty places that the model does not know.
    """
    stated, vocabulary = getattr(encoder.config, "pad_token_id", None), vocabulary_of(encoder)
    if not isinstance(stated, int) or stated < 0 or (vocabulary is not None and stated >= vocabulary):
        return 0
    return stated


def pooled_features(output: Any, pooling: str, mask_BN: Tensor | None) -> Tensor:
    """One feature vector per sample, [B, D], float32 where the weights are of half precision.

    Args:
        output: of the encoder: features [B, D], or an object with ``last_hidden_state`` [B, N, D].
        pooling: "encoder" (the encoder's own), "cls" (first token), "mean" (of the tokens), "last" (last token).
        mask_BN: which places are tokens, [B, N]; None: all.

    Raises:
        ClAdaptersError: the encoder does not pool itself.
    """
    if pooling == "encoder":
        features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if features is None:
            raise ClAdaptersError(
                f'pooling "encoder", but {type(output).__name__} has no features: choose "mean", "cls" or "last"'
            )
        return upcast(features)
    tokens: Tensor = upcast(output.last_hidden_state)
    if pooling == "cls":
        return tokens[:, 0]
    if mask_BN is None:
        return tokens[:, -1] if pooling == "last" else tokens.mean(1)
    if pooling == "last":
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last_B = (mask_BN.to(tokens.device) * (places + 1)).argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last_B]
    weight = mask_BN.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


def default_pooling(encoder: nn.Module) -> Pooling:
    """Texts: the last token where each token sees those before it only, else the mean. Others: their class token."""
    if modality_of(encoder) == "text":
        return "last" if is_causal(encoder) else "mean"
    names = (name.rpartition(".")[2] for name, _ in encoder.named_parameters())
    return "cls" if {"cls_token", "class_embedding", "class_token"} & set(names) else "mean"


def is_causal(encoder: nn.Module) -> bool:
    """Whether a token of a text model sees only those before it: tried with two texts that end differently.

    Each is computed on its own: the rows of one batch may be rounded differently.
    """
    tokens_BN = torch.tensor([[1, 2, 3], [1, 2, 4]], device=next(encoder.parameters()).device)
    with torch.no_grad():
        first, second = (call(encoder, row, mask_of(row)).last_hidden_state[0, :2] for row in tokens_BN.split(1))
    return bool(torch.equal(first, second))


def checked_tokens(encoder: nn.Module, tokens_BN: Tensor, name: str) -> Tensor:
    """Tokens without gaps, as the encoder can take them.

    Raises:
        DataError: no token ids, a text without any token, an unknown id, or more tokens than the model has places for.
    """
    if tokens_BN.ndim != 2 or tokens_BN.is_floating_point() or tokens_BN.dtype is torch.bool:
        raise DataError(
            f"backbone {name!r} takes token ids int64 [B, N], got {tokens_BN.dtype} {list(tokens_BN.shape)}; make them "
            "with backbone.preprocessing.encode(texts)"
        )
    tokens_BN = packed(tokens_BN.long())
    check_no_empty_text(mask_of(tokens_BN))
    vocabulary = vocabulary_of(encoder)
    highest = int(tokens_BN.max()) if tokens_BN.numel() else 0
    if vocabulary is not None and highest >= vocabulary:
        raise DataError(f"token id {highest}, but backbone {name!r} knows the ids 0..{vocabulary - 1}")
    stated: int | None = getattr(encoder.config, "max_position_embeddings", None)
    close = stated is not None and tokens_BN.shape[1] > stated // 2  # else there is no need to look
    places = positions_of(encoder) if close else None
    if places is not None and tokens_BN.shape[1] > places:
        raise DataError(
            f"a text of {tokens_BN.shape[1]} tokens, but backbone {name!r} has {places} positions: cut it, "
            "backbone.preprocessing.encode does so"
        )
    return tokens_BN


def positions_of(encoder: nn.Module) -> int | None:
    """The longest text that a model takes, in tokens; None: it does not say.

    RoBERTa and relatives count from the place behind the one of empty places, so their table has more rows.
    """
    stated = getattr(encoder.config, "max_position_embeddings", None)
    tables = (module for name, module in encoder.named_modules() if name.endswith("position_embeddings"))
    for table in tables:
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return None if stated is None else int(stated)


def vocabulary_of(encoder: nn.Module) -> int | None:
    """Number of token ids that the model knows, where it says so."""
    table = getattr(encoder, "get_input_embeddings", lambda: None)()
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else None


def dummy_input(encoder: nn.Module, h: Tensor, preprocessing: Any) -> Tensor:
    """An input of the size from which hidden states ``h`` [B, N, D] came; its content is of no matter."""
    if modality_of(encoder) == "text":
        return torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
    return torch.zeros(len(h), *_input_shape(encoder, preprocessing), device=h.device)


def probe_input(encoder: nn.Module, preprocessing: Any) -> Tensor:
    """Two small inputs, the same every time: texts of three tokens and one, images or spectrograms of waves."""
    device = next(encoder.parameters()).device
    if modality_of(encoder) == "text":
        return torch.tensor([[3, 2, 1], [2, -1, -1]], device=device)
    shape = (2, *_input_shape(encoder, preprocessing))
    return torch.arange(math.prod(shape), device=device).remainder(997).mul(0.1).sin().reshape(shape)


def _input_shape(encoder: nn.Module, preprocessing: Any) -> tuple[int, ...]:
    """Shape of one image or spectrogram."""
    config: Any = encoder.config
    if preprocessing is not None:
        return tuple(preprocessing.input_size)
    if modality_of(encoder) == "audio":
        return (int(config.max_length), int(config.num_mel_bins))
    side = image_side(config)
    return (int(config.num_channels), side or 0, side or 0)


def image_side(config: Any) -> int | None:
    """Side of the images that a model was made for."""
    side = getattr(config, "image_size", None)
    return int(side[-1] if isinstance(side, (list, tuple)) else side) if side is not None else None


def hidden_size_of(encoder: nn.Module) -> int | None:
    """Width D of the features: what the configuration says."""
    width = getattr(getattr(encoder, "config", None), "hidden_size", None)
    return width if isinstance(width, int) else None


def dtype_of(encoder: nn.Module) -> torch.dtype:
    """Type of the numbers that the encoder computes with."""
    return next((value.dtype for value in encoder.parameters() if value.is_floating_point()), torch.float32)


def check_pooling(pooling: str) -> None:
    """Check the name of a pooling.

    Raises:
        ConfigError: there is no such.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")


def require_transformers(encoder: nn.Module) -> None:
    """Check that this is an encoder of transformers with inputs that are known here.

    Raises:
        IncompatibleBackbone: it is not.
    """
    if modality_of(encoder) is None or hidden_size_of(encoder) is None:
        raise IncompatibleBackbone(
            f"{type(encoder).__name__} takes {getattr(encoder, 'main_input_name', 'unknown inputs')!r}; models of "
            f"transformers that take {', '.join(_NAMES)} and have a hidden_size can be used"
        )


@functools.cache
def _takes(kind: Any) -> frozenset[str]:
    """Names of what the forward of a class takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def upcast(values: Tensor) -> Tensor:
    """Half precision as float32, which holds it exactly; all else as it is."""
    return values.float() if values.dtype in HALVES else values
