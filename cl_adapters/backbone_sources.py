"""Where backbones come from: the package's own weights, timm with the hub, timm with a local file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_adapters.config import build
from cl_adapters.errors import BackboneUnavailable, IncompatibleBackbone, UnknownName, suggestion
from cl_adapters.preprocessing import Preprocessing

ASSETS = Path(__file__).parent / "assets"


def open_source(name: str, *, weights: str | Path | None, img_size: int | None) -> tuple[nn.Module, Preprocessing]:
    """Build the encoder named ``name`` with its weights; see ``FrozenBackbone.load``."""
    prefix, _, rest = name.partition(":")
    if rest and prefix == "timm":
        return _timm(rest, weights, img_size)
    embedded = sorted(path.stem for path in ASSETS.glob("*.safetensors"))
    if name not in embedded:
        hint = f"; did you mean 'timm:{name}'?" if _is_timm(name) else suggestion(name, embedded)
        raise UnknownName(
            f"unknown backbone {name!r}{hint} Known: {', '.join(embedded) or 'none embedded'}, or timm:<any timm model>"
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
