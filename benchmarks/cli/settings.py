"""Reading ``--set KEY=VALUE`` as users write it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from cl_adapters.errors import ConfigError


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Keys, dotted or not, to values read as YAML.

    Args:
        pairs: "lr=0.01", "blocks=[4,5]", ...

    Raises:
        ConfigError: no KEY=VALUE, a key given twice, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, got {pair!r}")
        if key in values:
            raise ConfigError(f"--set {key} is given twice")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: {text!r} is no YAML value; quote it") from error
    return values
