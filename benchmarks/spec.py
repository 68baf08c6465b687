"""Reading ``NAME`` and ``NAME:ARGUMENT`` as users write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_adapters.benchmarks.base import BenchmarkConfig, benchmarks
from cl_adapters.config import build
from cl_adapters.errors import ConfigError, UnknownName


def parse_benchmark(text: str, options: Mapping[str, Any]) -> tuple[str, BenchmarkConfig]:
    """Return the registered name and the configuration of a benchmark.

    Args:
        text: "digits" or, for a benchmark with an ``argument``, "folder:PATH".
        options: further fields by name, as plain values.

    Raises:
        UnknownName: no benchmark of that name.
        ConfigError: an unknown option, a wrong value, an argument that is missing, given twice, or not taken.
    """
    name, colon, argument = text.partition(":")
    cls = _find(name, text)
    values = dict(options)
    if colon and cls.argument is None:
        raise ConfigError(f"benchmark {name!r} takes no argument, got {text!r}; write {name!r} and set its options")
    if cls.argument is not None:
        form = f"{name}:{cls.argument.upper()}"
        if colon and not argument:
            raise ConfigError(f"{text!r} has nothing after the colon; write {form}")
        if colon and cls.argument in values:
            raise ConfigError(
                f"{cls.argument} is given twice: {argument!r} and {values[cls.argument]!r}; leave one out"
            )
        if colon:
            values[cls.argument] = argument
        elif cls.argument not in values and _required(cls, cls.argument):
            raise ConfigError(f"benchmark {name!r} needs its {cls.argument}; write {form}")
    return name, build(cls, values, "benchmark")


def _required(cls: type[BenchmarkConfig], name: str) -> bool:
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)  # type: ignore[arg-type]
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _find(name: str, text: str) -> type[BenchmarkConfig]:
    try:
        return benchmarks.get(name)
    except UnknownName as error:
        if Path(text).expanduser().is_dir():
            raise UnknownName(f"{error}. {text!r} is a folder: to use your own images write 'folder:{text}'") from None
        if Path(text).expanduser().is_file():
            raise UnknownName(f"{error}. {text!r} is a file: for a table of texts write 'text:{text}'") from None
        raise
