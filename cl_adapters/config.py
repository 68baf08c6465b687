"""Typed configuration: frozen dataclasses built from plain mappings (YAML, JSON, ``--set key=value``)."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cl_adapters.errors import ConfigError, suggestion
from cl_adapters.registry import Registry

C = TypeVar("C")

LARGEST = 2**63 - 1
"""No whole number of a configuration is larger: NumPy, torch and faiss compute with 64 bits."""

OMITTED_AT_DEFAULT = {"left out at its default": True}
"""Metadata of a dataclass field that came later than files in use: at its default these stay as they were."""


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build the frozen dataclass ``cls`` from plain values, checking every key and type.

    Args:
        cls: a dataclass type; its ``__post_init__`` may check ranges and raise ``ValueError``.
        values: field names to plain values (numbers, strings, lists, mappings for nested dataclasses). A mapping
            changes the field's own default, unless it names another "type".
        where: prefix of the field names in messages ("benchmark", "strategy").

    Raises:
        ConfigError: no mapping, an unknown key (with the nearest known one), a missing key, a wrong type or range, a
            number that is not finite.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a mapping of options, got {values!r}")
    prefix = f"{where}." if where else ""
    _check(cls, values, prefix)
    hashable: Any = cls  # for mypy, which takes no class for a key
    try:
        config: C = _adapter(hashable).validate_python(_on_defaults(cls, values))
    except ValidationError as error:
        problems = "; ".join(_explain(prefix, problem) for problem in error.errors())
        raise ConfigError(problems) from error
    return config


def build_named(registry: Registry[type[C]], value: str | Mapping[str, Any], where: str) -> C:
    """Build a plug-in of a registry from its name, or from a mapping with "type" and its options.

    Raises:
        UnknownName: no plug-in of that name.
        ConfigError: unknown option, wrong type or range.
    """
    name, options = split_name(value, where)
    return build(registry.get(name), options, where)


def split_name(value: Any, where: str, default: str = "") -> tuple[str, dict[str, Any]]:
    """Name and options of a plug-in, from its name or a mapping with "type", which is ``default`` where it is left out.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("type", default), str):
        raise ConfigError(f"{where} must be a name, or a mapping with 'type' and its options, got {value!r}")
    options = dict(value)
    return options.pop("type", default), options


def to_plain(config: Any) -> dict[str, Any]:
    """Return the dataclass as JSON-ready plain values; ``build`` of the same class gives it back.

    Its fields with the metadata :data:`OMITTED_AT_DEFAULT` are left out at their default.
    """
    cls: Any = type(config)
    unsaid = {
        field.name
        for field in dataclasses.fields(cls)
        if OMITTED_AT_DEFAULT.items() <= field.metadata.items() and getattr(config, field.name) == field.default
    }
    plain = _adapter(cls).dump_python(config, mode="json", include=set(_options(cls)) - unsaid)
    assert isinstance(plain, dict)
    return plain


def check_range(config: Any, interval: str, *names: str) -> None:
    """Check fields of a dataclass against an interval such as "[0, 1)" or "(0, inf)"; None passes.

    For ``__post_init__``, so that settings made in Python are checked as those from files; NaN lies in no interval.

    Raises:
        ConfigError: a field lies outside; names it.
    """
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if above and below:
            continue
        wanted = f"in {interval}"
        if not above and interval[0] == "(":
            wanted = "positive" if low == 0 and math.isinf(high) else wanted
        elif math.isinf(high) or isinstance(value, int):
            wanted = f"at least {low:.0f}" if not above else f"at most {high:.0f}"
        raise ConfigError(f"{name} must be {wanted}, got {value}")


def counted(value: Any, name: str) -> int:
    """A number of things, also one of NumPy's.

    Raises:
        ConfigError: it is no whole number, or less than 1.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} has to be a whole number, at least 1; got {value!r}")
    return number


def renamed_keyword(old: str, new: str, value: Any, other: Any) -> Any:
    """The ``value`` of a keyword that was given by its ``old`` name, with a warning to the caller's caller.

    Raises:
        ConfigError: ``other``, given by the ``new`` name, is there too.
    """
    if other is not None:
        raise ConfigError(f"{old} is the old name of {new}: pass {new} alone")
    warnings.warn(f"{old}=... is now {new}=...; the old name goes in version 0.3", DeprecationWarning, stacklevel=3)
    return value


def check_blocks(blocks: Sequence[int] | None, name: str = "blocks") -> None:
    """Check a choice of blocks; None passes. Whether the backbone has them is seen where it is known.

    Raises:
        ConfigError: a block is named twice, or negative.
    """
    if blocks is not None and (len(set(blocks)) < len(blocks) or min(blocks, default=0) < 0):
        raise ConfigError(f"{name} must name each block once, counted from 0, got {list(blocks)}")


def put_nested(target: dict[str, Any], path: Sequence[str], value: Any, *, named: bool = False) -> None:
    """Set one option of nested plain values in place, making the mappings on the way.

    With ``named``, a value on the way that is no mapping is a plug-in's name, which then becomes its "type".

    Raises:
        ConfigError: there is such a value, and it is not taken for a name.
    """
    for step in path[:-1]:
        inner = target.setdefault(step, {})
        if not isinstance(inner, dict):
            if not named:
                key = ".".join(path)
                raise ConfigError(f"{key} is an option of {step}, which is given as {inner!r} too: leave one out")
            inner = target[step] = {"type": inner}
        target = inner
    target[path[-1]] = value


def _options(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _check(cls: Any, values: Mapping[str, Any], prefix: str) -> None:
    """Reject, also in nested dataclasses, what pydantic would accept (true for 1) or name without a suggestion."""
    known, hints = _options(cls), _hints(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown option {prefix}{key!s}{suggestion(str(key), known)} Known: {', '.join(known)}")
        hint = hints[key]
        types = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
        leaves = _leaves(hint)
        if bool not in leaves and leaves & {int, float} and _holds(value, lambda entry: isinstance(entry, bool)):
            raise ConfigError(f"{prefix}{key}: input should be a number, got {value!r}")
        if _holds(value, lambda entry: isinstance(entry, int) and abs(entry) > LARGEST):
            raise ConfigError(f"{prefix}{key}: whole numbers must lie within +-2^63, got {value!r}")
        if isinstance(value, Mapping):
            for nested in filter(dataclasses.is_dataclass, types):
                _check(nested, value, f"{prefix}{key}.")


def _leaves(hint: Any) -> set[Any]:
    """The types of which an annotation is made."""
    inner = get_args(hint)
    return {leaf for part in inner for leaf in _leaves(part)} if inner else {hint}


def _holds(value: Any, wrong: Callable[[Any], bool]) -> bool:
    """Whether a value, or one in a list of values, is wrong."""
    return any(_holds(entry, wrong) for entry in value) if isinstance(value, list | tuple) else wrong(value)


def _on_defaults(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options on top of the default of their field.

    A strategy may want another scale or dropout of its adapters than the adapter type itself; asking for a wider
    bottleneck must not undo that.
    """
    hints = _hints(cls, extras=True)
    given = dict(values)
    for field in dataclasses.fields(cls):
        value = given.get(field.name)
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if dataclasses.is_dataclass(default) and isinstance(value, str | Mapping):
            plain = _adapter(hints[field.name]).dump_python(default, mode="json")
            options = {"type": value} if isinstance(value, str) else dict(value)
            if options.get("type", plain.get("type")) == plain.get("type"):
                given[field.name] = plain | options
    return given


@functools.cache
def _hints(cls: Any, extras: bool = False) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=extras)


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    if not dataclasses.is_dataclass(cls):  # the annotation of a field
        return TypeAdapter(cls, config=config)
    owner: Any = cls
    if not hasattr(owner, "__pydantic_config__"):
        owner.__pydantic_config__ = config
    return TypeAdapter(cls)


def _explain(prefix: str, problem: Any) -> str:
    place = (prefix + ".".join(str(part) for part in problem["loc"])).rstrip(".") or "configuration"
    if problem["type"] == "missing":
        return f"{place} is required"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # from __post_init__, whose own words name the value
        return f"{place}: {text}"
    return f"{place}: {text[:1].lower()}{text[1:]}, got {problem['input']!r}"
