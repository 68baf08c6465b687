"""Typed configuration: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest

from cl_adapters.adapters.base import adapter_to_plain
from cl_adapters.adapters.lora import LoRA
from cl_adapters.config import build, put_nested, to_plain
from cl_adapters.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    kind: Literal["soft", "hard"] = "soft"
    scale: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be ascending, got {self.scale}")


class Base(ABC):
    argument: ClassVar[str | None] = None

    @abstractmethod
    def run(self) -> int:
        """Return something."""


@dataclass(frozen=True, kw_only=True)
class Outer(Base):
    argument: ClassVar[str | None] = "path"

    path: str
    tasks: int = 5
    rate: float = 0.1
    seed: int | None = None
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    optional: Inner | None = None
    many: tuple[Inner, ...] = ()
    derived: int = field(init=False, default=3)

    def run(self) -> int:
        return self.tasks


def test_defaults_and_plain_values() -> None:
    config = build(Outer, {"path": "x", "tasks": "7", "seed": 0, "inner": {"scale": [0.5, 1]}, "many": [{}]})
    assert config == Outer(path="x", tasks=7, seed=0, inner=Inner(scale=(0.5, 1.0)), many=(Inner(),))
    assert isinstance(config.tasks, int)
    assert isinstance(config.inner.scale, tuple)
    assert config.run() == 7
    assert config.derived == 3


def test_instances_of_nested_dataclasses_are_taken() -> None:
    inner = Inner(kind="hard")
    assert build(Outer, {"path": "x", "inner": inner, "optional": inner}).optional == inner


def test_round_trip_through_json() -> None:
    config = Outer(path="x", optional=Inner(kind="hard", scale=(0.1, 0.3)), many=(Inner(), Inner(kind="hard")))
    plain = json.loads(json.dumps(to_plain(config)))
    assert build(Outer, plain) == config
    assert "argument" not in plain
    assert "derived" not in plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "^run.path is required$"),
        ({"path": "x", "taks": 1}, "^unknown option run.taks; did you mean 'tasks'\\? Known: path, tasks, rate"),
        ({"path": "x", "qqq": 1}, "^unknown option run.qqq. Known: path"),
        ({"path": "x", "argument": "y"}, "^unknown option run.argument"),
        ({"path": "x", "derived": 4}, "^unknown option run.derived"),
        ({"path": 3}, "^run.path: input should be a valid string, got 3$"),
        ({"path": "x", "tasks": "many"}, "^run.tasks: .*valid integer.*got 'many'$"),
        ({"path": "x", "tasks": 2.5}, "^run.tasks: .*fractional part, got 2.5$"),
        ({"path": "x", "tasks": None}, "^run.tasks: .*valid integer, got None$"),
        ({"path": "x", "tasks": True}, "^run.tasks: input should be a number, got True$"),
        ({"path": "x", "seed": False}, "^run.seed: input should be a number, got False$"),
        ({"path": "x", "rate": True}, "^run.rate: input should be a number, got True$"),
        ({"path": "x", "flag": "perhaps"}, "^run.flag: .*boolean.*got 'perhaps'$"),
        ({"path": "x", "inner": 3}, "^run.inner: .*instance of Inner, got 3$"),
        ({"path": "x", "inner": {"kid": "soft"}}, "^unknown option run.inner.kid; did you mean 'kind'\\?"),
        ({"path": "x", "optional": {"kid": "soft"}}, "^unknown option run.optional.kid; did you mean 'kind'\\?"),
        ({"path": "x", "many": [{"kid": "soft"}]}, "^run.many.0.kid: "),
        ({"path": "x", "inner": {"kind": "mild"}}, "^run.inner.kind: input should be 'soft' or 'hard', got 'mild'$"),
        ({"path": "x", "inner": {"scale": [1.0, 0.0]}}, "^run.inner: scale must be ascending, got \\(1.0, 0.0\\)$"),
        ({"path": "x", "inner": {"scale": [1.0]}}, "^run.inner.scale.1 is required$"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, values, "run")


@dataclass(frozen=True, kw_only=True)
class OwnDefaults:
    """A nested default that is not the nested class's own."""

    inner: Inner = field(default_factory=lambda: Inner(kind="hard", scale=(1, 5)))


def test_nested_options_change_the_fields_default_not_the_types() -> None:
    assert build(OwnDefaults, {"inner": {"scale": [2, 3]}}).inner == Inner(kind="hard", scale=(2, 3))
    assert build(OwnDefaults, {}).inner == Inner(kind="hard", scale=(1, 5))
    assert build(OwnDefaults, to_plain(OwnDefaults())) == OwnDefaults()


def test_nested_options_of_another_type_start_from_that_type() -> None:
    from cl_adapters.adapters.lora import LoRA
    from cl_adapters.strategies.sema import SEMAConfig

    default = SEMAConfig().adapter
    assert getattr(default, "scale", None) == 1.0, "SEMA's own, MOS has 0.1"
    assert build(SEMAConfig, {"adapter": "bottleneck"}).adapter == default
    assert build(SEMAConfig, {"adapter": {"bottleneck": 8}}).adapter == replace(default, bottleneck=8)  # type: ignore[type-var]
    assert build(SEMAConfig, {"adapter": {"type": "lora", "rank": 3}}).adapter == LoRA(rank=3)


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^tasks: .*; rate: "):
        build(Outer, {"path": "x", "tasks": "a", "rate": "b"})


def test_config_errors_are_value_errors_and_keep_their_cause() -> None:
    with pytest.raises(ValueError) as caught:
        build(Inner, {"scale": [2, 1]})
    assert str(caught.value) == "configuration: scale must be ascending, got (2.0, 1.0)"
    assert caught.value.__cause__ is not None


def test_abstract_class_cannot_be_built() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unfinished(Base):
        tasks: int = 1

    with pytest.raises(TypeError, match="abstract"):
        build(Unfinished, {})  # type: ignore[type-abstract]


def test_an_option_that_came_later_is_written_where_it_is_set() -> None:
    """So that what is saved with defaults stays the same, and is read by earlier versions."""
    old = {"rank": 5, "targets": ["key", "value"], "scale": 1.0, "learn_scale": False, "dropout": 0.0}
    assert to_plain(LoRA()) == old
    assert build(LoRA, old) == LoRA()
    changed = LoRA(init_scheme="gaussian")
    assert adapter_to_plain(changed) == {"type": "lora"} | old | {"init_scheme": "gaussian"}
    assert build(LoRA, to_plain(changed)) == changed


def test_a_nested_option_of_a_value_is_refused_unless_the_value_is_a_plug_ins_name() -> None:
    plain: dict[str, Any] = {"adapter": "lora"}
    with pytest.raises(ConfigError, match=r"adapter\.rank is an option of adapter, which is given as 'lora' too"):
        put_nested(plain, ["adapter", "rank"], 2)
    put_nested(plain, ["adapter", "rank"], 2, named=True)
    put_nested(plain, ["outer", "inner", "key"], 3)
    assert plain == {"adapter": {"type": "lora", "rank": 2}, "outer": {"inner": {"key": 3}}}


@pytest.mark.parametrize("values", [1e308, None, "path", [1]])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="predictor must be a mapping of options, got"):
        build(Outer, values, "predictor")
