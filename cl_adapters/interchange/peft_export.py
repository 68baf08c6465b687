"""An adapter as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters._io import new_folder, put_tensors, write_json
from cl_adapters.adapters.base import AdapterType, adapter_to_plain, adapters
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import sites_of
from cl_adapters.errors import ClAdaptersError, ConfigError, UnknownName
from cl_adapters.interchange.peft_folder import (
    CONFIG,
    OURS,
    PREFIX,
    SCHEMA_VERSION,
    TENSORS,
    by_module,
    height_of,
    origin,
    rows_of,
)
from cl_adapters.merge.adapters import Factors, factors_of
from cl_adapters.sites.sites import Site

TASK_TYPES: dict[str | None, bool] = {
    None: False,
    "FEATURE_EXTRACTION": False,
    "CAUSAL_LM": True,
    "SEQ_CLS": True,
    "TOKEN_CLS": True,
    "QUESTION_ANS": True,
}
"""PEFT's task types, and whether they mean a model with a head; without those that need a decoder beside an encoder."""


def export_peft(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    adapter: AdapterType,
    backbone: FrozenBackbone,
    *,
    task_type: str | None = None,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a low-rank adapter as a PEFT folder; ``PeftModel.from_pretrained(model, folder)`` then computes the same.

    All scales, learned ones too, are multiplied into B (lora_alpha = r). Heads and prototypes stay behind: PEFT has no
    place for them.

    PEFT finds layers by their names, and a model with a head holds the encoder under a name of its own. So the folder
    is either for the encoder alone (``AutoModel``, timm), the default, or for the model with a head that ``task_type``
    means (``task_type="CAUSAL_LM"``: ``AutoModelForCausalLM``); into the other one PEFT would load nothing, with a
    warning. For a head that PEFT has no task for, such as that of ``AutoModelForMaskedLM``, give the prefix.

    Args:
        folder: is made; nothing of it exists where writing fails.
        tensors: as from ``AdapterBank.export``, at all sites or some.
        adapter: their type.
        backbone: whose sites they are for.
        task_type: as in PEFT: FEATURE_EXTRACTION for the encoder, CAUSAL_LM, SEQ_CLS, TOKEN_CLS or QUESTION_ANS for a
            model with a head.
        prefix: name of the encoder in the model that loads the folder ("model", "transformer", "bert"); "" where it is
            that model. Default by ``task_type``, as transformers calls the encoder.
        overwrite: replace a PEFT folder that is there.

    Raises:
        ConfigError: the type is no low-rank change of linear layers; a task type that means a model with a head, where
            it is not known what that calls the encoder.
        UnknownName: no such task type.
        ClAdaptersError: tensors that do not fit the backbone.
        IncompatibleBackbone: the sites are not whole linear layers, or thirds of them.
        StorageError: the folder exists or cannot be written.
    """
    factors = factors_of(adapter, tensors)
    if factors is None:
        raise ConfigError(
            f"adapters of type {adapters.name_of(adapter)!r} cannot be exported: PEFT has only low-rank changes of "
            "linear layers (our type 'lora'), and no bottleneck adapters"
        )
    start = _start(backbone, task_type) if prefix is None else prefix
    start = f"{start}." if start else ""
    layers = by_module(sites_of(backbone, adapter))
    _check(factors, layers)
    used = {module: [site for site in sites if site.name in factors] for module, sites in layers.items()}
    pairs = {module: _stacked(sites, factors) for module, sites in used.items() if sites}
    rank = max(len(a_RD) for a_RD, _ in pairs.values())
    content = {}
    for module, (a_RD, b_OR) in pairs.items():
        missing = rank - len(a_RD)  # an adapter without some of the thirds here
        content[f"{PREFIX}{start}{module}.lora_A.weight"] = torch.nn.functional.pad(a_RD, (0, 0, 0, missing))
        content[f"{PREFIX}{start}{module}.lora_B.weight"] = torch.nn.functional.pad(b_OR, (0, missing))
    config = _config(rank, [f"{start}{module}" for module in pairs], getattr(adapter, "dropout", 0.0))
    config |= _base(backbone, list(pairs), task_type, start)
    with new_folder(Path(folder), replaces=(CONFIG, TENSORS) if overwrite else ()) as scratch:
        put_tensors(scratch, TENSORS, content)
        write_json(scratch / CONFIG, config)
        ours = {"schema_version": SCHEMA_VERSION, "backbone": origin(backbone), "adapter": adapter_to_plain(adapter)}
        write_json(scratch / OURS, ours)
    return Path(folder)


def _check(factors: Mapping[str, Factors], layers: Mapping[str, list[Site]]) -> None:
    sites = {site.name: site for at in layers.values() for site in at}
    if not factors:
        raise ClAdaptersError("there is nothing to export: the adapter has no tensors")
    for name, (a_RD, b_OR) in factors.items():
        site = sites.get(name)
        if site is None or (site.width, site.out_width) != (a_RD.shape[1], len(b_OR)):
            there = "no such site" if site is None else f"one of {site.out_width} x {site.width}"
            raise ClAdaptersError(
                f"the adapter does not fit the backbone: at {name!r} it changes a matrix of {len(b_OR)} x "
                f"{a_RD.shape[1]}, the backbone has {there}"
            )


def _stacked(sites: list[Site], factors: Mapping[str, Factors]) -> Factors:
    """One pair for the whole layer, as in the picture of :mod:`cl_adapters.interchange.peft_folder`."""
    pairs = [factors[site.name] for site in sites]
    a_RD = torch.cat([a_RD for a_RD, _ in pairs])
    b_OR = a_RD.new_zeros(height_of(sites), len(a_RD))
    start = 0
    for site, (one, b) in zip(sites, pairs, strict=True):
        b_OR[rows_of(site), start : start + len(one)] = b
        start += len(one)
    return a_RD, b_OR


def _start(backbone: FrozenBackbone, task_type: str | None) -> str:
    """The encoder's name in the model that a task type means."""
    if task_type not in TASK_TYPES:
        raise UnknownName.of("task type", str(task_type), [name for name in TASK_TYPES if name])
    if not TASK_TYPES[task_type]:
        return ""
    start = getattr(backbone.encoder, "base_model_prefix", "")
    if not start:
        raise ConfigError(
            f"task_type {task_type!r} means a model with a head, but it is not known what that calls the encoder of "
            f"{backbone.name!r}: give its name, prefix=..., or leave task_type out"
        )
    return str(start)


def _base(backbone: FrozenBackbone, modules: list[str], task_type: str | None, start: str) -> dict[str, Any]:
    """What the configuration says of the model: PEFT's AutoPeftModel classes load it by that."""
    encoder: Any = backbone.encoder
    found: dict[str, Any] = {
        "task_type": task_type,
        "base_model_name_or_path": getattr(encoder, "name_or_path", "") or None,
        "fan_in_fan_out": any(not isinstance(encoder.get_submodule(module), nn.Linear) for module in modules),
    }
    if task_type is None and not start and hasattr(encoder, "base_model_prefix"):
        cls = type(encoder)
        found["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return found


def _config(rank: int, modules: list[str], dropout: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "target_modules": modules,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
