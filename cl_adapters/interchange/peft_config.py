"""Configurations of PEFT: how they are read, and what in them is more than plain LoRA."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_adapters._io import parse_json, read_regular
from cl_adapters.errors import ClAdaptersError, ConfigError, StorageError
from cl_adapters.interchange.peft_folder import CONFIG

LIMIT = 2**20
"""Most bytes of a configuration that is read."""
PLAIN = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields of plain LoRA, which are understood."""
PATTERNS = {"rank_pattern", "alpha_pattern"}
"""Ranks and scales of single layers: understood of tensors, which have them; our types have one of each."""
HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # they belong to init_lora_weights
    "fan_in_fan_out",  # how the base weight lies; A and B never do so
}
"""Fields that say what the tensors or the backbone say anyway, or where they came from."""
INSTEAD = {
    "use_dora": "set use_dora=False: the length that DoRA learns for every row is no low-rank change",
    "modules_to_save": "leave it out: heads are kept beside the adapters here, each class with its own row",
    "bias": 'set bias="none": biases of the backbone are shared by all adapters and never change',
    "lora_bias": "set lora_bias=False",
    "rank_pattern": "choose one rank for all layers",
    "alpha_pattern": "choose one lora_alpha for all layers",
    "layer_replication": "replicate the layers in the backbone itself, before it is wrapped",
    "target_parameters": "name linear layers in target_modules",
    "trainable_token_indices": "leave it out: the embeddings of tokens are shared by all adapters and never change",
}
"""What to do without a field, where there is more to say than to leave it out."""
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Starts that leave the backbone's weights alone; others, such as "pissa", change them."""
EMPTY: tuple[Any, ...] = (None, False, "none", "", [], {}, set(), ())
"""Values of a field that is not used."""


def read_config(source: Any) -> tuple[dict[str, Any], str]:
    """A configuration as plain values, and its name for messages.

    Args:
        source: a ``peft.LoraConfig``, a mapping like its file, that file (adapter_config.json), or a folder with it.

    Raises:
        StorageError: a file that is missing or no JSON.
        ConfigError: something else.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        path = path / CONFIG if path.is_dir() else path
        return _read_file(path), str(path)
    found = source if isinstance(source, Mapping) else None
    if hasattr(source, "to_dict"):
        found = source.to_dict()
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"expected a configuration of PEFT, as peft.LoraConfig, mapping, file or folder, got {source!r}"
        )
    return {str(key): _plain(value) for key, value in found.items()}, f"the given {type(source).__name__}"


def beyond_lora(config: Mapping[str, Any], known: set[str]) -> str | None:
    """Why a configuration uses more than plain LoRA with these fields, with the way out; None: it does not."""
    if config.get("peft_type") != "LORA":
        return (
            f"is of peft_type {config.get('peft_type')!r}; only LORA can be read. Where that is a change of weights, "
            "newer versions of PEFT write a trained adapter as LoRA: peft.convert_to_lora, peft.save_as_lora"
        )
    for field, value in config.items():
        if field not in known | HARMLESS and value not in EMPTY:
            return f"uses {field}={value!r}; only plain LoRA can be read: {INSTEAD.get(field, 'leave it out')}"
    return None


def keeps_base(start: Any) -> bool:
    """Whether this ``init_lora_weights`` is known to leave the backbone's weights alone."""
    return isinstance(start, bool | str | None) and (start.lower() if isinstance(start, str) else start) in KEEPS_BASE


def scale_of(
    config: Mapping[str, Any], rank: int, alpha: Any, where: str, error: type[ClAdaptersError] = ConfigError
) -> float:
    """lora_alpha / r, or with use_rslora lora_alpha / sqrt(r) (Kalajdzievski 2023).

    Raises:
        error: no number.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise error(f"{where}: lora_alpha must be a number, got {alpha!r}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def dropout_of(config: Mapping[str, Any], where: str, error: type[ClAdaptersError] = ConfigError) -> float:
    """The rate in [0, 1).

    Raises:
        error: no such number.
    """
    rate = config.get("lora_dropout") or 0.0
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise error(f"{where}: lora_dropout must be in [0, 1), got {rate!r}")
    return float(rate)


def _plain(value: Any) -> Any:
    """As JSON would have it."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LIMIT:
            raise StorageError(f"{path} is larger than {LIMIT} bytes; that is no adapter's configuration")
        config = parse_json(read_regular(path), parse_constant=float)  # PEFT itself lets NaN through
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing; a PEFT folder has it") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}
