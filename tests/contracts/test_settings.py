"""Numbers of every registered configuration: what cannot be is refused in one error that names the field."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from cl_adapters.adapters.base import adapters
from cl_adapters.benchmarks.base import benchmarks
from cl_adapters.benchmarks.run.experiment import BackboneConfig, resolve
from cl_adapters.codecs import codecs
from cl_adapters.config import LARGEST, build
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.index.backends.base import indexes
from cl_adapters.parts.keys import KeysConfig
from cl_adapters.predictors.base import predictors
from cl_adapters.strategies.base import strategies
from cl_adapters.strategies.instruct import instruct_methods

NEGATIVE = {"slot", "slots", "scale", "thickness"}
"""Fields in which -1 may mean something: the bare backbone, an adapter that is subtracted, a thinner stroke."""
SEEN_IN_LOAD = {"tasks", "order_seed", "image_seed"}
"""Of benchmarks: checked against the classes, or with the run's seed, when the data are loaded."""
REQUIRED = {"path": "x", "file": "x.csv", "folder": "x", "dataset": "x"}


def configurations() -> dict[str, type[Any]]:
    """Every configuration that a user can set fields of, by the name of its class."""
    registries: list[Any] = [adapters, benchmarks, codecs, predictors]
    found = [registry.get(name) for registry in registries for name in registry.names()]
    found += [strategies.get(name).Config for name in strategies.names()]
    found += [instruct_methods.get(name).Config for name in instruct_methods.names()]
    found += [indexes.get(name).Options for name in indexes.names()]
    found += [KeysConfig, BackboneConfig]
    nested = [default for cls in found for default in map(type, defaults(cls)) if dataclasses.is_dataclass(default)]
    return {cls.__qualname__: cls for cls in [*found, *nested]}


def defaults(cls: Any) -> Iterator[Any]:
    for field in dataclasses.fields(cls):
        yield field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def numbers() -> list[Any]:
    """(class, field, whether whole, how many numbers; 0: a single one) of every numeric field."""
    rows = []
    for cls in configurations().values():
        for field in dataclasses.fields(cls):
            hint = get_type_hints(cls)[field.name]
            kinds = {hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))}
            if field.init and kinds & {int, float}:
                many = any("tuple" in str(kind) for kind in kinds)
                length = len(field.default) if many and isinstance(field.default, tuple) else int(many)
                whole = float not in kinds
                rows.append(pytest.param(cls, field.name, whole, length, id=f"{cls.__qualname__}.{field.name}"))
    return rows


def built(cls: type[Any], name: str, length: int, value: float) -> Any:
    given = {field.name: REQUIRED[field.name] for field in dataclasses.fields(cls) if field.name in REQUIRED}
    if cls is KeysConfig and name == "per_class":
        given["kind"] = "centroids"
    return build(cls, given | {name: [value] * length if length else value})


@pytest.mark.parametrize(("cls", "name", "whole", "length"), numbers())
def test_numbers_that_cannot_be_are_refused(cls: type[Any], name: str, whole: bool, length: int) -> None:
    impossible = [math.nan, math.inf, -math.inf, *([LARGEST + 1, -LARGEST - 1, 2**70] if whole else [])]
    for value in impossible:
        with pytest.raises(ConfigError, match=name):
            built(cls, name, length, value)
    allowed = name in NEGATIVE | SEEN_IN_LOAD
    with contextlib.suppress(ConfigError) if allowed else pytest.raises(ConfigError, match=name):
        built(cls, name, length, -1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("bottleneck", 10**9), ("rank", 10**9), ("length", 10**9), ("kernel", 10**9 + 1)],
        *[("blocks", [0, 0]), ("blocks", [-1]), ("expandable", [2, 2]), ("weight_decay", -1), ("momentum", 2)],
        *[("max_steps", -1), ("max_steps", 0), ("train_epochs", 0), ("train_mb_size", -4), ("eval_mb_size", 0)],
        *[("train_mb_size", 10**9), ("cached_views", 10**9), ("lr", 0), ("projection", 10**9), ("temperature", 0)],
        *[("img_size", 0), ("crop_pct", 0), ("size", 10**9), ("test_fraction", 1), ("recall", 2), ("k", 0)],
    ],
)
def test_absurd_settings_are_refused_wherever_they_exist(name: str, value: Any) -> None:
    owners = [cls for cls in configurations().values() if name in {field.name for field in dataclasses.fields(cls)}]
    assert owners
    for cls in owners:
        with pytest.raises(ConfigError, match=name):
            built(cls, name, 0, value)


def test_settings_made_in_python_are_checked_too() -> None:
    for cls in configurations().values():
        for name in {"lr", "scale", "temperature", "weight_decay"} & {f.name for f in dataclasses.fields(cls)}:
            if isinstance(getattr(cls, name, None), float):
                with pytest.raises(ValueError, match=name):
                    cls(**{name: math.nan})


@pytest.mark.parametrize("seed", [-1, 2**70])
@pytest.mark.parametrize("benchmark", ["digits", "glyphs", "repeats"])
def test_seeds_that_cannot_be_are_one_error(benchmark: str, seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        resolve("simple_cil", benchmark, seed=seed)
    for name in ("order_seed", "image_seed"):
        cls: Any = benchmarks.get(benchmark)
        if name in {field.name for field in dataclasses.fields(cls)}:
            with pytest.raises(ClAdaptersError, match="seed"):
                build(cls, {name: seed}).load(0)
