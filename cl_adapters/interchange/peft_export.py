"""An adapter as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapter_to_plain, adapters
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.bank import sites_of
from cl_adapters.errors import ClAdaptersError, ConfigError
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
from cl_adapters.sites import Site
from cl_adapters.storage import new_folder, put_tensors, write_json


def export_peft(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    adapter: AdapterType,
    backbone: FrozenBackbone,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a low-rank adapter as a PEFT folder; ``PeftModel.from_pretrained(encoder, folder)`` then computes the same.

    All scales, learned ones too, are multiplied into B (lora_alpha = r). Heads and prototypes stay behind: PEFT has no
    place for them.

    Args:
        folder: is made; nothing of it exists where writing fails.
        tensors: as from ``AdapterBank.export``, at all sites or some.
        adapter: their type.
        backbone: whose sites they are for.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ConfigError: the type is no low-rank change of linear layers.
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
    layers = by_module(sites_of(backbone, adapter))
    _check(factors, layers)
    used = {module: [site for site in sites if site.name in factors] for module, sites in layers.items()}
    pairs = {module: _stacked(sites, factors) for module, sites in used.items() if sites}
    rank = max(len(a_RD) for a_RD, _ in pairs.values())
    content = {}
    for module, (a_RD, b_OR) in pairs.items():
        missing = rank - len(a_RD)  # an adapter without some of the thirds here
        content[f"{PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a_RD, (0, 0, 0, missing))
        content[f"{PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(b_OR, (0, missing))
    with new_folder(Path(folder), overwrite=overwrite) as scratch:
        put_tensors(scratch, TENSORS, content)
        write_json(scratch / CONFIG, _config(rank, list(pairs), getattr(adapter, "dropout", 0.0)))
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


def _config(rank: int, modules: list[str], dropout: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
