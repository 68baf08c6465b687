"""Backbones from transformers: a local folder, or a name on the model hub. Never a pickle, never foreign code."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from cl_adapters.backbones.hf_forward import image_side, modality_of, positions_of, require_transformers
from cl_adapters.backbones.hf_image import preprocessing_of
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.errors import BackboneUnavailable, ConfigError, IncompatibleBackbone

LONGEST = 512
"""Tokens of a text by default, where the model takes more."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOWERS = ("vision_model", "language_model")
"""Parts of models with two kinds of input; the first that is there is taken."""


def open_transformers(
    place: str,
    *,
    img_size: int | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> tuple[nn.Module, Preprocessing | TextPreprocessing | None]:
    """The encoder in a folder or of a name, with its preprocessing; see ``FrozenBackbone.load``."""
    library = transformers_library()
    _check_folder(place)
    encoder = _encoder(library, place, {"dtype": resolved_dtype(dtype), "quantization": quantization})
    require_transformers(encoder)
    modality = modality_of(encoder)
    if modality != "image" and img_size is not None:
        raise ConfigError(f"img_size={img_size}, but {place} takes {modality}")
    if modality != "text" and max_length is not None:
        raise ConfigError(f"max_length={max_length}, but {place} takes {modality}: only texts have a length in tokens")
    if modality == "text":
        return encoder, _text_preprocessing(library, place, encoder, max_length)
    if modality == "image":
        processor = asked(place, lambda: library.AutoImageProcessor.from_pretrained(place, trust_remote_code=False))
        return encoder, preprocessing_of(processor, img_size or image_side(encoder.config), img_size is not None)
    return encoder, None


def resolved_dtype(dtype: str | None) -> str:
    """The name of the type of the weights: float32 by default, for "auto" bfloat16 where a GPU of this machine has it.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype == "auto":
        has = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return "bfloat16" if has else "float32"
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return dtype or "float32"


def transformers_library() -> Any:
    """The library.

    Raises:
        BackboneUnavailable: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneUnavailable(
            'backbones of the form "hf:..." need the library transformers: pip install "cl-adapters[text]"'
        ) from error
    return transformers


def loading_arguments(library: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What every model is loaded with: weights of that type from safetensors, and no code of the folder's."""
    key = "dtype" if _version(library) >= (4, 56) else "torch_dtype"
    return {key: dtype, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}


def _check_folder(place: str) -> None:
    """Tell early what is wrong with a local folder; a name on the hub passes."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1:
            raise BackboneUnavailable(f"no folder {place}: hf: takes a folder with a config.json, or a name on the hub")
        return
    if not (folder / "config.json").is_file():
        raise BackboneUnavailable(f"{place} has no config.json: it is no folder of a transformers model")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise BackboneUnavailable(f"{place} has no .safetensors file{_convert(place) if pickles else ''}")


def _convert(place: str) -> str:
    return (
        ", only pickles, which are never loaded because they can run code. If you trust the file, convert it once: "
        "python -c \"from transformers import AutoModel; m = AutoModel.from_pretrained('"
        f"{place}'); m.save_pretrained('{place}')\""
    )


def _encoder(library: Any, place: str, options: dict[str, Any]) -> nn.Module:
    """The encoder alone: no head, one tower, nothing of it random."""
    dtype = DTYPES[options["dtype"]]
    arguments = loading_arguments(library, dtype)
    if options["quantization"] is not None:
        arguments["quantization_config"] = quantization_config(library, options["quantization"], dtype)
    with quiet(library):
        model, report = asked(place, lambda: library.AutoModel.from_pretrained(place, **arguments))
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    prefix = ""
    for tower in TOWERS:
        if isinstance(getattr(model, tower, None), nn.Module) and len(list(model.children())) > 1:
            model, prefix = getattr(model, tower), f"{tower}."
            if not hasattr(model, "main_input_name"):  # version 4 has a plain module there
                model.main_input_name = "pixel_values"
            break
    missing = [key.removeprefix(prefix) for key in report["missing_keys"] if key.startswith(prefix)]
    return _without_random_parts(model, missing, place)


def _without_random_parts(encoder: Any, missing: list[str], place: str) -> nn.Module:
    """Take out a pooler that the file has no weights for: it would be another one in every process.

    Raises:
        IncompatibleBackbone: other weights are missing.
    """
    if missing and all(key.startswith("pooler.") for key in missing):
        encoder.pooler = None
    elif missing:
        raise IncompatibleBackbone(
            f"{place} does not hold the weights of {type(encoder).__name__}: missing {missing[:5]}"
        )
    return encoder  # type: ignore[no-any-return]


def _text_preprocessing(library: Any, place: str, encoder: nn.Module, max_length: int | None) -> TextPreprocessing:
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        reason = "" if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else "it knows no word"
    except Exception as error:  # what is raised differs with the kind of tokenizer that is missing
        reason = f"{type(error).__name__}: {_short(error)}"
    if reason:
        raise BackboneUnavailable(
            f"{place} takes texts, but no tokenizer can be loaded from it ({reason}): save the model's tokenizer there "
            "with tokenizer.save_pretrained"
        )
    places = positions_of(encoder)
    if max_length is not None and places is not None and max_length > places:
        raise ConfigError(f"max_length={max_length}, but {place} has {places} positions: choose at most {places}")
    limits = [LONGEST, places or LONGEST, int(min(tokenizer.model_max_length, LONGEST))]
    try:
        return TextPreprocessing.of(tokenizer, max_length if max_length is not None else min(limits))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def quantization_config(library: Any, quantization: str, dtype: torch.dtype) -> Any:
    """The library's own configuration of quantised weights.

    Raises:
        ConfigError: an unknown name.
        BackboneUnavailable: none of the packages that can do it is installed.
    """
    ways: dict[str, dict[str, Any]] = {
        "int8": {
            "bitsandbytes": lambda: library.BitsAndBytesConfig(load_in_8bit=True),
            "torchao": lambda: library.TorchAoConfig("int8_weight_only"),
            "optimum.quanto": lambda: library.QuantoConfig(weights="int8"),
        },
        "nf4": {
            "bitsandbytes": lambda: library.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        },
    }
    if quantization not in ways:
        raise ConfigError(f"unknown quantization {quantization!r}; known: {', '.join(ways)}")
    for package, make in ways[quantization].items():
        if _installed(package):
            return make()
    names = " or ".join(package.replace(".", "-") for package in ways[quantization])
    raise BackboneUnavailable(
        f"quantization={quantization!r} needs the package {names}, and none is installed here: pip install "
        f"{next(iter(ways[quantization]))}, or leave quantization out"
    )


def _installed(package: str) -> bool:
    top = package.partition(".")[0]
    return importlib.util.find_spec(top) is not None and importlib.util.find_spec(package) is not None


def asked(place: str, load: Any) -> Any:
    """What ``load`` gives.

    Raises:
        BackboneUnavailable: it does not; says the way out.
    """
    try:
        return load()
    # the last three: weights of other shapes than config.json says, sizes that cannot be, a damaged file
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        text = _short(error)
        pickled = _convert(place) if "safetensors" in text and "not appear" in text else ""
        raise BackboneUnavailable(
            f"cannot load {place!r} with transformers ({type(error).__name__}: {text}){pickled}. Without network, copy "
            'the model\'s files into a folder (config.json, *.safetensors, tokenizer files) and pass "hf:FOLDER"'
        ) from error


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


def _version(library: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(library.__version__))[:2])


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Say nothing of heads that a file holds and nobody asked for."""
    logging = library.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
