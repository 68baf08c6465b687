"""A PEFT folder as an adapter of ours. What is not plain LoRA on known projections is refused, never half read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cl_adapters._io import read_json, read_regular
from cl_adapters.adapters.lora import LoRA, Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone, StorageError
from cl_adapters.interchange.peft_config import (
    PATTERNS,
    PLAIN,
    beyond_lora,
    dropout_of,
    keeps_base,
    read_config,
    scale_of,
)
from cl_adapters.interchange.peft_folder import (
    CONFIG,
    OURS,
    PICKLE,
    PREFIX,
    SCHEMA_VERSION,
    TENSORS,
    height_of,
    lora_layers,
    rows_of,
)
from cl_adapters.merge.adapters import Factors
from cl_adapters.sites.sites import Site


@dataclass(frozen=True, kw_only=True)
class ImportedAdapter:
    """An adapter from a PEFT folder.

    Attributes:
        adapter: LoRA with the rank and targets that were found.
        tensors: float32, for ``AdapterBank.add_slot``.
    """

    adapter: LoRA
    tensors: dict[str, Tensor]


def import_peft(folder: str | Path, backbone: FrozenBackbone, adapter: LoRA | None = None) -> ImportedAdapter:
    """Read a LoRA adapter that PEFT has saved (or :func:`export_peft`); it then computes the same here.

    An adapter on a fused projection becomes one per third that it changes: with its own rank where the factors are
    those of :func:`export_peft`, else with the folder's. Different ranks are filled up with zeros. lora_alpha / r, or
    with use_rslora lora_alpha / sqrt(r), is multiplied into B.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        backbone: the one that it was trained on. Where it was trained inside a model with a head, the names of all its
            layers begin with the encoder's name there ("model.layers.0..." of LlamaForCausalLM, "bert.encoder...").
        adapter: the type that the result shall have, such as that of a bank; default: what fits.

    Raises:
        StorageError: files that are missing, damaged or pickles, or more than plain LoRA.
        IncompatibleBackbone: layers that are not known as sites of the backbone, or another backbone than the one noted
            at the export.
        ClAdaptersError: the adapter does not fit the given type.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_origin(folder, backbone)
    layers = lora_layers(backbone)
    if not layers:
        raise IncompatibleBackbone(f"backbone {backbone.name!r} has no linear layers that LoRA knows")
    factors = _compact(_by_site(_named_as_here(_read_pairs(folder, config), layers), layers))
    kinds = {site.kind for site in factors}
    found = LoRA(
        rank=max(len(a_RD) for a_RD, _ in factors.values()),
        targets=tuple(kind for kind in get_args(Target) if kind in kinds),
        dropout=dropout_of(config, str(folder / CONFIG), StorageError),
    )
    if adapter is not None:
        _check_fits(found, adapter)
        found = adapter
    tensors: dict[str, Tensor] = {}
    for site, (a_RD, b_OR) in factors.items():
        missing = found.rank - len(a_RD)
        _, params = found.from_factors(F.pad(a_RD, (0, 0, 0, missing)), F.pad(b_OR, (0, missing)))
        tensors |= {f"{site.name}/{name}": value for name, value in params.items()}
    return ImportedAdapter(adapter=found, tensors=tensors)


# --- names and thirds -------------------------------------------------------------------------------------------


def _by_site(pairs: Mapping[str, Factors], layers: Mapping[str, list[Site]]) -> dict[Site, Factors]:
    """Every layer's factors at its sites: A whole, of B their rows; without the thirds that are nowhere changed."""
    found: dict[Site, Factors] = {}
    for module, (a_RD, b_OR) in pairs.items():
        at = layers[module]
        if (a_RD.shape[1], len(b_OR)) != (at[0].width, height_of(at)):
            raise IncompatibleBackbone(
                f"the adapter changes a matrix of {len(b_OR)} x {a_RD.shape[1]} at {module!r}, the backbone has one "
                f"of {height_of(at)} x {at[0].width} there"
            )
        found |= {site: (a_RD, b_OR[rows_of(site)]) for site in at}
    changed = {site.kind for site, (_, b_OR) in found.items() if b_OR.any()}
    return {site: pair for site, pair in found.items() if site.qkv_part is None or not changed or site.kind in changed}


def _compact(factors: dict[Site, Factors]) -> dict[Site, Factors]:
    """Each third with the columns of B that it uses, and their rows of A, if that gives all one rank.

    Otherwise all keep the rank of the layer: components that are 0 on both sides could never be trained again.
    """
    used = {site: b_OR.any(0) for site, (_, b_OR) in factors.items()}
    counts = {int(columns.sum()) for columns in used.values()}
    if all(site.qkv_part is None for site in factors) or len(counts) > 1 or 0 in counts:
        return factors
    return {site: (a_RD[used[site]], b_OR[:, used[site]]) for site, (a_RD, b_OR) in factors.items()}


def _check_fits(found: LoRA, adapter: LoRA) -> None:
    surplus = sorted(set(found.targets) - set(adapter.targets))
    if surplus:
        raise ClAdaptersError(
            f"the adapter changes the {' and '.join(surplus)} projections, which {adapter} does not; import it without "
            "a type, or into one with these targets"
        )
    if found.rank > adapter.rank:
        raise ClAdaptersError(
            f"the adapter has rank {found.rank}, more than {adapter}; import it without a type, and reduce its rank "
            "with merge_adapters([tensors], adapter, 'mean', rank=...)"
        )


def _named_as_here(pairs: Mapping[str, Factors], layers: Mapping[str, list[Site]]) -> dict[str, Factors]:
    """The factors by the backbone's names of its layers: without what stands before all of them."""
    found: dict[str, Factors] = {}
    before: dict[str, str] = {}
    for module, pair in pairs.items():
        known = _layer(module, layers)
        before[module.removesuffix(known)] = module
        found[known] = pair
    if len(before) > 1:  # two towers, or two encoders in one model: which of them is the backbone?
        raise IncompatibleBackbone(
            f"the adapter changes {' and '.join(map(repr, list(before.values())[:2]))}, which are layers of different "
            "encoders; only an adapter of one encoder can be imported"
        )
    return found


def _layer(module: str, layers: Mapping[str, list[Site]]) -> str:
    for known in layers:
        if module == known or module.endswith(f".{known}"):
            return known
    kinds = dict.fromkeys(site.kind for at in layers.values() for site in at)
    raise IncompatibleBackbone(
        f"the adapter changes {module!r}, but of this backbone LoRA knows only the layers {', '.join(kinds)}, such as "
        f"{next(iter(layers))!r}"
    )


# --- files -------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    config, where = read_config(folder / CONFIG)
    problem = beyond_lora(config, PLAIN | PATTERNS)
    if problem is not None:
        raise StorageError(f"{where} {problem}")
    start = config.get("init_lora_weights")
    if not keeps_base(start):
        raise StorageError(
            f"{where} was initialised with {start!r}, which also changes the backbone; save it in PEFT with "
            "path_initial_model_for_weight_conversion, as a change of the original backbone"
        )
    return config


def _check_origin(folder: Path, backbone: FrozenBackbone) -> None:
    if not (folder / OURS).exists():
        return  # from PEFT itself, which notes at most a name
    noted = read_json(folder / OURS, schema_version=SCHEMA_VERSION).get("backbone")
    fingerprint = noted.get("fingerprint") if isinstance(noted, dict) else None
    if fingerprint != backbone.fingerprint:
        name = noted.get("name") if isinstance(noted, dict) else None
        raise IncompatibleBackbone(
            f"the adapter in {folder} is for the backbone {name!r} ({str(fingerprint)[:12]}), not for "
            f"{backbone.name!r} ({backbone.fingerprint[:12]}); remove {OURS} there if you know better"
        )


def _read_pairs(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    """A and B of every module, float32, with the scaling in B."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(_read_tensors(folder).items()):
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or value.ndim != 2 or not value.is_floating_point():
            raise StorageError(
                f"{folder / TENSORS} has {key!r}, {value.dtype} {list(value.shape)}; only the matrices "
                f"{PREFIX}MODULE.lora_A.weight and lora_B.weight can be read. Heads (modules_to_save) must stay out"
            )
        halves.setdefault(match[1], {})[match[2]] = value.float()
    pairs = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"} or len(half["A"]) != half["B"].shape[1] or not len(half["A"]):
            shapes = {name: list(value.shape) for name, value in half.items()}
            raise StorageError(f"{folder / TENSORS}: {module!r} needs A [r, D] and B [O, r], got {shapes}")
        pairs[module] = (half["A"], half["B"] * _scaling(module, len(half["A"]), config, folder / CONFIG))
    if not pairs:
        raise StorageError(f"{folder / TENSORS} has no tensors")
    return pairs


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    try:
        return load(read_regular(path))
    except FileNotFoundError as error:
        if (folder / PICKLE).exists():
            raise StorageError(
                f"{folder} has {PICKLE}, a pickle, which can run any code and is never read; where you trust it, save "
                "it again in PEFT with save_pretrained(..., safe_serialization=True)"
            ) from error
        raise StorageError(f"{path} is missing; a PEFT folder has it") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} is not a readable safetensors file: {error}") from error


def _scaling(module: str, rank: int, config: Mapping[str, Any], path: Path) -> float:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise StorageError(f"{path}: rank_pattern and alpha_pattern must be objects, got {ranks!r} and {alphas!r}")
    noted, alpha = (_of_module(module, *one) for one in ((ranks, config.get("r")), (alphas, config.get("lora_alpha"))))
    if noted != rank:
        raise StorageError(f"{path} says that {module!r} has rank {noted!r}, its tensors have {rank}")
    return scale_of(config, rank, alpha, str(path), StorageError)


def _of_module(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The first pattern that is the module's name or the end of it; expressions of others are not evaluated."""
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.-]+", pattern):
            raise StorageError(f"the pattern {pattern!r} is no plain module name; only those can be read")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default
