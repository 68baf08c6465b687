"""Where backbones come from: the package's own weights, timm with the hub or a local file, transformers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_adapters.backbones.hf_forward import Pooling, check_pooling, default_pooling
from cl_adapters.backbones.hf_load import open_transformers, resolved_dtype
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.config import build
from cl_adapters.errors import BackboneUnavailable, ConfigError, IncompatibleBackbone, UnknownName, suggestion

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Opened:
    """What a name stands for.

    Attributes:
        encoder: with its weights.
        preprocessing: of its inputs.
        pooling: None: as a wrapped module of this kind is pooled.
        source: arguments of ``FrozenBackbone.load`` that give the same again, in another folder too.
    """

    encoder: nn.Module
    preprocessing: Preprocessing | TextPreprocessing | None
    pooling: Pooling | None
    source: dict[str, Any]


def open_source(
    name: str,
    *,
    weights: str | Path | None,
    img_size: int | None,
    crop_pct: float | None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> Opened:
    """Build the encoder named ``name`` with its weights; see ``FrozenBackbone.load``."""
    prefix, _, rest = name.partition(":")
    source: dict[str, Any] = {
        "name": name,
        "weights": None if weights is None else str(Path(weights).resolve()),
        "img_size": img_size,
        "crop_pct": crop_pct,
    }
    special = {"pooling": pooling, "max_length": max_length, "dtype": dtype, "quantization": quantization}
    preprocessing: Preprocessing | TextPreprocessing | None
    if rest and prefix == "hf":
        if weights is not None:
            raise ConfigError(f"{name} names its folder or hub entry itself: leave weights={str(weights)!r} out")
        if pooling is not None:
            check_pooling(pooling)
        if dtype is not None:
            special["dtype"] = dtype = resolved_dtype(dtype)  # "auto" may be another one elsewhere
        source["name"] = absolute_name(name)
        encoder, preprocessing = open_transformers(
            source["name"].removeprefix("hf:"),
            img_size=img_size,
            max_length=max_length,
            dtype=dtype,
            quantization=quantization,
        )
        pooling = pooling or default_pooling(encoder)
    else:
        given = [key for key, value in special.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} is an option of transformers models (hf:...), not of {name!r}: leave it out")
        encoder, preprocessing = _named(name, prefix, rest, weights, img_size)
    source |= {key: value for key, value in special.items() if value is not None}
    return Opened(encoder, _cropped(preprocessing, crop_pct, name), pooling, source)


def absolute_name(name: str) -> str:
    """A name with a folder as it is found from anywhere ("hf:" and a folder); all others as they are."""
    prefix, _, place = name.partition(":")
    folder = Path(place).expanduser()
    return f"hf:{folder.resolve()}" if prefix == "hf" and place and folder.is_dir() else name


def moved_source(source: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The arguments of ``FrozenBackbone.load`` for a backbone whose weights file, or folder, is now ``place``."""
    if str(source["name"]).startswith("hf:"):
        return {**source, "name": f"hf:{place.expanduser().absolute()}"}
    return {**source, "weights": str(place)}


def _cropped(
    preprocessing: Preprocessing | TextPreprocessing | None, crop_pct: float | None, name: str
) -> Preprocessing | TextPreprocessing | None:
    if crop_pct is None:
        return preprocessing
    if not isinstance(preprocessing, Preprocessing):
        raise ConfigError(f"crop_pct={crop_pct}, but {name!r} takes no images")
    try:
        return dataclasses.replace(preprocessing, crop_pct=crop_pct)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _named(
    name: str, prefix: str, rest: str, weights: str | Path | None, img_size: int | None
) -> tuple[nn.Module, Preprocessing]:
    """A timm model or an embedded one."""
    if rest and prefix == "timm":
        return _timm(rest, weights, img_size)
    embedded = sorted(path.stem for path in ASSETS.glob("*.safetensors"))
    if name not in embedded:
        hint = f"; did you mean 'timm:{name}'?" if _is_timm(name) else suggestion(name, embedded)
        raise UnknownName(
            f"unknown backbone {name!r}{hint} Known: {', '.join(embedded) or 'none embedded'}, timm:<any timm model>, "
            "or hf:<folder or name of a transformers model>"
        )
    if weights is not None or img_size is not None:
        raise IncompatibleBackbone(f"the embedded backbone {name!r} has its own weights and image size")
    return _embedded(name)


def _embedded(name: str) -> tuple[nn.Module, Preprocessing]:
    from timm.models.vision_transformer import VisionTransformer

    card = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    encoder = VisionTransformer(**{**card["architecture"], "num_classes": 0})
    state = {key: value.float() for key, value in load_file(ASSETS / f"{name}.safetensors").items()}
    encoder.load_state_dict(state, strict=True)
    return encoder, build(Preprocessing, card["preprocessing"], f"{name}.preprocessing")


def _timm(name: str, weights: str | Path | None, img_size: int | None) -> tuple[nn.Module, Preprocessing]:
    import timm
    from timm.data import resolve_model_data_config

    if not _is_timm(name):
        near = suggestion(name.partition(".")[0], timm.list_models())
        raise UnknownName(f"unknown timm model {name!r}{near} timm.list_models() and timm.list_pretrained() list them")
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        encoder = timm.create_model(name, pretrained=weights is None, num_classes=0, **size)
    except TypeError as error:
        raise IncompatibleBackbone(f"timm model {name!r} does not take img_size={img_size}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise BackboneUnavailable(
            f"cannot get the weights of timm model {name!r} ({type(error).__name__}: {error}). Without network, copy "
            "the model.safetensors of that model here and pass it as weights=FILE (--weights FILE)"
        ) from error
    if weights is not None:
        _load_local(encoder, Path(weights), name)
    data = resolve_model_data_config(encoder)
    if img_size is not None:
        data["input_size"] = (data["input_size"][0], img_size, img_size)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return encoder, build(Preprocessing, {key: data[key] for key in keys}, "preprocessing")


def _is_timm(name: str) -> bool:
    import timm

    base, _, tag = name.partition(".")
    return timm.is_model(base) and (not tag or name in timm.list_pretrained(f"{base}.*"))


def _load_local(encoder: nn.Module, path: Path, name: str) -> None:
    """Load a .safetensors file; every weight but the classifier's must be there and fit."""
    if path.suffix != ".safetensors":
        raise BackboneUnavailable(f"weights must be a .safetensors file (pickles are never loaded), got {path}")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneUnavailable(f"cannot read the weights file {path}: {error}") from error
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, encoder)  # timm's own: renames keys, resamples position embeddings
    classifier = encoder.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    try:
        missing, unexpected = encoder.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise IncompatibleBackbone(f"{path} does not fit timm model {name!r}: {error}") from error
    unexpected = [key for key in unexpected if not key.startswith(tuple(f"{head}." for head in heads))]
    if missing or unexpected:
        raise IncompatibleBackbone(
            f"{path} does not fit timm model {name!r}: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
