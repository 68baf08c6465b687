"""A configuration of PEFT as options of ours, on a given backbone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

from cl_adapters.adapters.lora import LoRA, Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ConfigError, IncompatibleBackbone
from cl_adapters.interchange.peft_config import PLAIN, beyond_lora, dropout_of, keeps_base, read_config, scale_of
from cl_adapters.interchange.peft_folder import lora_layers
from cl_adapters.sites.places import is_linear
from cl_adapters.sites.sites import Site

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer."""


class LoRAOptions(TypedDict):
    """Options of strategies and of :class:`cl_adapters.AdapterBank`.

    Attributes:
        adapter: the adapter type.
        blocks: indices of the blocks that get adapters; None: all.
    """

    adapter: LoRA
    blocks: tuple[int, ...] | None


def lora_from_peft(config: Any, backbone: FrozenBackbone) -> LoRAOptions:
    """A LoRA configuration of PEFT as options of ours: ``MOS(model=backbone, **lora_from_peft(config, backbone))``.

    r, lora_alpha, use_rslora, lora_dropout, init_lora_weights (True, False, "gaussian"), target_modules (names, an
    expression, "all-linear", or none: PEFT's choice for the model, where PEFT is installed), exclude_modules,
    layers_to_transform and layers_pattern mean what they mean in PEFT; names may be those of a model with a head
    ("model.layers.0.self_attn.q_proj"). The rest must have its default: what would be lost is refused by name.

    On a fused projection PEFT has one A of rank r for query, key and value together, we have one for each: more
    numbers, and exported an adapter of three times the rank.

    Args:
        config: a ``peft.LoraConfig``, a mapping like its file, that file (adapter_config.json), or a folder with it.
        backbone: the one that it is for; it says which layers the names mean.

    Raises:
        ConfigError: more than plain LoRA, names of no layer, or numbers out of range.
        IncompatibleBackbone: layers that are no sites of the backbone, or other ones from block to block.
        StorageError: a file that is missing or damaged.
    """
    values, where = read_config(config)
    values["target_modules"] = _named(values.get("target_modules"), backbone)
    problem = beyond_lora(values, PLAIN)
    if problem is not None:
        raise ConfigError(f"{where} {problem}")
    start = _start_of(values.get("init_lora_weights", True), where)
    rank = values.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{where}: r must be a whole number of at least 1, got {rank!r}")
    sites = _targets(values, where, backbone)
    kinds = {site.kind for site in sites}
    blocks = sorted({site.block for site in sites})
    if len(sites) != len(kinds) * len(blocks):
        raise IncompatibleBackbone(
            f"{where} means other layers in one block than in another; here an adapter has the same in all its blocks. "
            "Choose blocks with layers_to_transform, and layers by their last names in target_modules"
        )
    every = {site.block for at in lora_layers(backbone).values() for site in at}
    adapter = LoRA(
        rank=rank,
        targets=tuple(kind for kind in get_args(Target) if kind in kinds),
        scale=scale_of(values, rank, values.get("lora_alpha", 8), where),
        dropout=dropout_of(values, where),
        init_scheme=start,
    )
    return {"adapter": adapter, "blocks": None if set(blocks) == every else tuple(blocks)}


def _start_of(start: Any, where: str) -> Literal["kaiming", "gaussian", "random"]:
    """Our name of PEFT's ``init_lora_weights`` (its ``LoraLayer.reset_lora_parameters``)."""
    if start is True or start is None:
        return "kaiming"
    if start is False:
        return "random"
    if isinstance(start, str) and start.lower() == "gaussian":
        return "gaussian"
    reason = (
        "adapters cannot start so here"
        if keeps_base(start)
        else "it changes the weights of the backbone, which all adapters share"
    )
    raise ConfigError(
        f"{where} uses init_lora_weights={start!r}: {reason}. Set it to True, False or 'gaussian'; or let PEFT train "
        "the adapter, and read it with import_peft"
    )


# --- which layers ------------------------------------------------------------------------------------------------


def _targets(config: Mapping[str, Any], where: str, backbone: FrozenBackbone) -> list[Site]:
    """The sites on all layers that PEFT would adapt."""
    _check_targets(config, where)
    targets: str | Sequence[str] = config["target_modules"]
    encoder, layers = backbone.encoder, lora_layers(backbone)
    has = f"; LoRA knows its {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in layers))}"
    names = [name for name, module in encoder.named_modules() if name and (targets != ALL_LINEAR or is_linear(module))]
    # as the encoder has them; else as a model with a head does
    starts = ["", *(f"{start}." for start in (getattr(encoder, "base_model_prefix", ""),) if start)]
    found: list[str] = []
    for start in starts:
        found = found or [name for name in names if _meant(start + name, config)]
    absent = [] if isinstance(targets, str) else _absent(targets, [start + name for start in starts for name in names])
    if absent or not found:
        what = f"names {absent[0]!r}" if absent else f"is {targets!r}, with the options beside it"
        raise ConfigError(f"{where}: target_modules {what}; {backbone.name!r} has no such layer{has}")
    unknown = [name for name in found if name not in layers]
    if unknown:
        raise IncompatibleBackbone(
            f"{where} means {unknown[0]!r} of {backbone.name!r}, which is no place for an adapter{has}. Name it in "
            "exclude_modules, or name fewer target_modules"
        )
    return [site for name in found for site in layers[name]]


def _named(targets: Any, backbone: FrozenBackbone) -> Any:
    """The layers as the configuration names them; where it names none, those that PEFT chooses for such a model."""
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if targets is not None:
        return targets
    try:
        known = importlib.import_module("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    except (ImportError, AttributeError):
        return None
    return known.get(getattr(getattr(backbone.encoder, "config", None), "model_type", None))


def _check_targets(config: Mapping[str, Any], where: str) -> None:
    targets = config.get("target_modules")
    if not targets or not isinstance(targets, str | list | tuple):
        raise ConfigError(
            f"{where}: target_modules must be names, an expression or {ALL_LINEAR!r}, got {targets!r} (without "
            "any, PEFT, where it is installed, chooses for many models of transformers, but for this one it does not)"
        )
    if isinstance(targets, str) and config.get("layers_to_transform") not in (None, []):
        raise ConfigError(f"{where}: layers_to_transform needs target_modules as a list of names, got {targets!r}")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            try:
                re.compile(config[field])
            except re.error as error:
                raise ConfigError(f"{where}: {field} is no regular expression: {error}") from error


def _absent(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    return [target for target in targets if not any(_ends(name, [target]) for name in names)]


def _meant(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts the layer of this name (its ``check_target_module_exists``)."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends(name, excluded):
        return False
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return _ends(name, targets) and _in_layers(name, config.get("layers_to_transform"), config.get("layers_pattern"))


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _in_layers(name: str, layers: int | Sequence[int] | None, patterns: str | Sequence[str] | None) -> bool:
    """Whether the first number in the name, or the one behind a pattern, is one of the layers."""
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    # without a pattern PEFT wants the list of layers to lie in something: "model.layers.3.", not "layers.3."
    starts = [rf"(?:.*?\.)?{one}" for one in ([patterns] if isinstance(patterns, str) else patterns or [])]
    for start in starts or [r".*?\.[^.]*"]:
        match = re.match(rf"{start}\.(\d+)\.", name)
        if match is not None:
            return int(match[1]) in wanted
    return False
