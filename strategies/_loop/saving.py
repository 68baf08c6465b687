"""A strategy as a folder, from which it goes on as if it had never stopped.

    strategy.json        class, settings, clock, curves and last values of the evaluator, what plugins and metrics keep,
                         SHA-256 of the other files and of its own content
    model/               the AdapterModel
    state.safetensors    the tensors that plugins and metrics keep, where there are any

Nothing random is stored, since all of it follows from seed and task. What was given as an object, such as an optimizer
or a plugin, has to be given again: it is recorded by name, and no pickle is ever written or read.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates.base_sgd import PeriodicEval
from pydantic import Field
from torch import Tensor

from cl_adapters._forms import SHA, Count, Label, clipped, shown
from cl_adapters._io import (
    get_tensors,
    new_folder,
    put_tensors,
    read_json,
    read_regular,
    read_settled,
    sealed,
    unsealed,
    write_json,
)
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, ConfigError, StorageError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import CARD, save_model
from cl_adapters.predictors.base import predictor_from, predictor_to_plain
from cl_adapters.strategies._loop.kept import State, keeps_data, restore, split, state_of
from cl_adapters.strategies.recipe import without_recipe

SCHEMA = 1
FILE = "strategy.json"
MODEL = "model"
STATE = "state.safetensors"

S = TypeVar("S")
T = TypeVar("T")
Whole = Annotated[int, Field(strict=True)]
Number = Whole | Annotated[float, Field(strict=True)] | Literal["nan", "inf", "-inf"]
"""JSON has no numbers for the last three."""


@dataclass(frozen=True, kw_only=True)
class _Clock:
    """The counters of Avalanche's clock."""

    train_iterations: Count
    train_exp_counter: Count
    train_exp_epochs: Count
    train_exp_iterations: Count
    train_epoch_iterations: Count
    total_iterations: Count


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A plugin or metric: its name, what it keeps (None: nobody knows), and the names of its tensors."""

    name: str
    state: dict[str, Any] | None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """The values of a metric, and the iterations of training at which they were measured."""

    x: tuple[Whole, ...]
    y: tuple[Number, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"a curve has {len(self.x)} places for {len(self.y)} values")


@dataclass(frozen=True, kw_only=True)
class _Brought:
    """Names of what was given instead of the method's recipe."""

    optimizer: str | None
    criterion: str | None
    scheduler: str | None


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """``strategy.json``, each value in its form."""

    schema_version: int
    strategy: str
    config: dict[str, Any]
    seed: Annotated[str, Field(pattern=r"^-?[0-9]{1,40}$")]  # torch's own seeds have 64 bits without a sign
    task_incremental: bool
    task_classes: tuple[tuple[Label, tuple[Label, ...]], ...]
    class_names: tuple[tuple[Label, str], ...]
    predictor: dict[str, Any] | None
    brought: _Brought
    train_mb_size: Annotated[int, Field(strict=True, ge=1)]
    eval_mb_size: Annotated[int, Field(strict=True, ge=1)]
    eval_every: Annotated[int, Field(strict=True, ge=-1)]
    peval_mode: Literal["experience", "epoch", "iteration"]
    clock: _Clock
    curves: dict[str, _Curve]
    last: dict[str, Number]
    metrics: tuple[_Kept, ...]
    plugins: tuple[_Kept, ...]
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = any(kept.tensors for kept in (*self.metrics, *self.plugins))
        wanted = {f"{MODEL}/{CARD}", *((STATE,) if tensors else ())}
        if set(self.files) != wanted or not all(map(SHA.fullmatch, self.files.values())):
            raise ValueError(f"files has to give the SHA-256 of {sorted(wanted)}")


# --- save --------------------------------------------------------------------------------------------------------


def save_strategy(strategy: Any, path: Path, *, overwrite: bool = False) -> Path:
    """Write a strategy as the folder ``path``; see :meth:`AdapterStrategy.save`."""
    plugins, metrics = _own_plugins(strategy), strategy.evaluator.metrics
    for plugin in plugins:
        if state_of(plugin) is None and keeps_data(plugin):
            raise ConfigError(
                f"{_name(plugin)} keeps samples, weights or counters without a place in a saved strategy, so this one "
                "would not go on as if it had never stopped: give a subclass state_dict() and load_state_dict(state), "
                "take avalanche.checkpointing.save_checkpoint (a pickle), or save the model alone with "
                "strategy.model.save(folder)"
            )
    tensors: dict[str, Tensor] = {}
    kept = {"plugins": _kept("plugins", plugins, tensors), "metrics": _kept("metrics", metrics, tensors)}
    content = _describe(strategy) | {name: [asdict(each) for each in entries] for name, entries in kept.items()}
    with new_folder(path, replaces=(FILE, f"{MODEL}/{CARD}") if overwrite else ()) as folder:
        save_model(strategy.model, folder / MODEL)
        files = {f"{MODEL}/{CARD}": _sha(folder / MODEL / CARD)}
        if tensors:
            files[STATE] = put_tensors(folder, STATE, tensors)
        write_json(folder / FILE, sealed(content | {"files": files}))
    return path


def _describe(strategy: Any) -> dict[str, Any]:
    last, strange = _numbers(strategy.evaluator.last_metric_results)
    curves = {}
    for name, (x, y) in strategy.evaluator.all_metric_results.items():
        values = list(_numbers(dict(enumerate(y)))[0].values())
        if len(values) == len(y):
            curves[name] = {"x": list(x), "y": values}
        else:
            strange.append(name)
    if strange:
        warnings.warn(f"values that are no numbers are not saved: {', '.join(sorted(set(strange)))}", stacklevel=4)
    return {
        "schema_version": SCHEMA,
        "strategy": type(strategy).__name__,
        "config": to_plain(strategy.config),
        "seed": str(int(strategy.seed)),
        "task_incremental": strategy.task_incremental,
        "task_classes": strategy._task_classes.to_plain(),
        "class_names": [
            (int(label), name) for label, name in strategy.model.class_names.items()
        ],  # of later classes too
        "predictor": None if strategy._given is None else predictor_to_plain(strategy._given),
        "brought": asdict(_brought(strategy)),
        "train_mb_size": strategy.train_mb_size,
        "eval_mb_size": strategy.eval_mb_size,
        "eval_every": strategy.eval_every,
        "peval_mode": next(plugin for plugin in strategy.plugins if isinstance(plugin, PeriodicEval)).peval_mode,
        "clock": {name: getattr(strategy.clock, name) for name in _Clock.__dataclass_fields__},
        "curves": curves,
        "last": last,
    }


def _kept(where: str, things: Sequence[Any], tensors: dict[str, Tensor]) -> list[_Kept]:
    """What each keeps; its tensors are added to ``tensors``, and who cannot be asked is named by a warning."""
    found = []
    for number, thing in enumerate(things):
        name, state = _name(thing), state_of(thing)
        plain, own = (None, {}) if state is None else split(name, state)
        if state is None:
            warnings.warn(
                f"what {name} counts is not saved and begins anew when the strategy is loaded: if it counts anything, "
                "give it state_dict() and load_state_dict(state)",
                stacklevel=4,
            )
        tensors |= {_key(where, number, key): value for key, value in own.items()}
        found.append(_Kept(name=name, state=plain, tensors=tuple(own)))
    return found


def _numbers(values: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
    """Those that are numbers, as JSON holds them, and the keys of the others."""
    plain: dict[Any, Any] = {}
    for key, value in values.items():
        if isinstance(value, numbers.Integral):
            plain[key] = int(value)
        elif isinstance(value, numbers.Real):
            plain[key] = float(value) if math.isfinite(value) else str(float(value))
    return plain, [key for key in values if key not in plain]


def _brought(strategy: Any) -> _Brought:
    found = {
        "optimizer": None if strategy._dial is None else strategy._dial.optimizer,
        "criterion": strategy._criterion,
        "scheduler": strategy._schedules.by_epoch,
    }
    names = {key: getattr(value, "__name__", _name(value)) for key, value in found.items()}
    return _Brought(**{key: name if key in strategy._brought else None for key, name in names.items()})


# --- load --------------------------------------------------------------------------------------------------------


def load_strategy(
    cls: Callable[..., S],
    path: Path,
    backbone: FrozenBackbone | None,
    *,
    device: Any,
    plugins: Sequence[Any],
    evaluator: Any,
    brought: Mapping[str, Any],
    **options: Any,
) -> S:
    """Read the folder ``path`` into a new ``cls``; see :meth:`AdapterStrategy.load`.

    ``brought`` has "optimizer", "criterion" and "scheduler", None where they are the method's; ``options`` are others
    of the constructor.
    """
    where, name = path / FILE, getattr(cls, "__name__", "")
    given = {key: value is not None for key, value in brought.items()}

    def read() -> tuple[_Saved, dict[str, Tensor], AdapterModel]:
        saved = _read(path)
        _check_fits(saved, name, path, given, [_name(plugin) for plugin in plugins])
        tensors = get_tensors(path / STATE, saved.files[STATE]) if STATE in saved.files else {}
        model = AdapterModel.load(path / MODEL, backbone, str(device))
        card = path / MODEL / CARD
        if _sha(card) != saved.files[f"{MODEL}/{CARD}"]:  # after it was read: a save may have come between
            raise StorageError(f"{card} is not the one that {FILE} belongs to; restore a copy")
        return saved, tensors, model

    saved, tensors, model = read_settled(where, read)
    kept = _split_up(saved, tensors, where)
    with _blaming(where):
        config = build(cls.Config, saved.config, name)  # type: ignore[attr-defined]
        predictor = None if saved.predictor is None else predictor_from(saved.predictor)
        absent = {label for _, labels in saved.task_classes for label in labels} - set(model.classes)
        if absent:
            raise ConfigError(f"task_classes has class {min(absent)}, which its model does not know")
    if brought["optimizer"] is not None:
        config = without_recipe(config)
    strategy: Any = cls(
        model,
        **brought,
        seed=int(saved.seed),
        config=config,
        device=device,
        plugins=plugins,
        evaluator=evaluator,
        eval_every=saved.eval_every,
        peval_mode=saved.peval_mode,
        task_incremental=saved.task_incremental,
        class_names=dict(saved.class_names),
        predictor=predictor,
        **options,
    )
    now = asdict(_brought(strategy))
    for key, then in asdict(saved.brought).items():
        if now[key] != then:
            raise ConfigError(f"this {name} was saved with {key}= a {then}, not a {now[key]}")
    strategy.train_mb_size, strategy.eval_mb_size = saved.train_mb_size, saved.eval_mb_size
    strategy._task_classes.load(saved.task_classes)
    vars(strategy.clock).update(asdict(saved.clock))
    for number, plugin in enumerate(plugins):
        _give(plugin, kept["plugins", number], where)
    _restore_evaluator(strategy.evaluator, saved, kept, where)
    found: S = strategy
    return found


def _check_fits(saved: _Saved, name: str, path: Path, given: Mapping[str, bool], plugins: list[str]) -> None:
    """Check that a strategy is loaded as what it was.

    Raises:
        ConfigError: it is of another class than ``name``; or an object is missing, or too many.
    """
    if saved.strategy != name:
        raise ConfigError(f"{path} holds a {saved.strategy}, no {name}: load it with {saved.strategy}.load(...)")
    for key, then in asdict(saved.brought).items():
        if then is not None and not given[key]:
            raise ConfigError(f"this {name} was saved with {key}= a {then}: give it again, {name}.load(..., {key}=...)")
        if then is None and given[key]:
            raise ConfigError(f"this {name} was saved with the method's own {key}: leave {key}= out")
    wanted = [kept.name for kept in saved.plugins]
    if plugins != wanted:
        raise ConfigError(
            f"this {name} was saved with the plugins [{', '.join(wanted)}]: give new ones of these classes with "
            f"plugins=, in this order; got [{', '.join(plugins)}]"
        )


def _restore_evaluator(
    evaluator: EvaluationPlugin, saved: _Saved, kept: Mapping[tuple[str, int], State | None], where: Path
) -> None:
    """Give an evaluator the curves and values, and its metrics what those of the same name kept."""
    if evaluator.collect_all:
        for name, curve in saved.curves.items():
            evaluator.all_metric_results[name] = (list(curve.x), [_value(y) for y in curve.y])
    evaluator.last_metric_results.update({name: _value(value) for name, value in saved.last.items()})
    there = _by_place(evaluator.metrics, _name)
    before = _by_place(range(len(saved.metrics)), lambda number: saved.metrics[number].name)
    for place, number in before.items():
        if place not in there and kept["metrics", number]:
            warnings.warn(f"{place[0]} is not in this evaluator=, so what it knew is lost", stacklevel=4)
    for place, metric in there.items():
        if place in before:
            _give(metric, kept["metrics", before[place]], where)
        elif state_of(metric):
            warnings.warn(f"{place[0]} was not in the evaluator that was saved, and begins anew", stacklevel=4)


def _by_place(things: Iterable[T], name: Callable[[T], str]) -> dict[tuple[str, int], T]:
    """Things by their name, and how many of that name come before."""
    found: dict[tuple[str, int], T] = {}
    for thing in things:
        found[name(thing), sum(key[0] == name(thing) for key in found)] = thing
    return found


def _give(thing: Any, state: State | None, where: Path) -> None:
    if state:
        with _blaming(where, Exception):  # others' code; what contradicts itself surfaces in many ways
            restore(thing, state)


def _split_up(saved: _Saved, tensors: Mapping[str, Tensor], where: Path) -> dict[tuple[str, int], State | None]:
    """What each plugin and metric kept, with its tensors.

    Raises:
        StorageError: the tensors are others than those that are named.
    """
    entries = {
        (place, number): kept
        for place, every in (("plugins", saved.plugins), ("metrics", saved.metrics))
        for number, kept in enumerate(every)
    }
    named = {_key(*at, key) for at, kept in entries.items() for key in kept.tensors}
    if named != set(tensors):
        raise StorageError(f"{where} and {STATE} name different tensors; restore a copy")
    return {
        at: None if kept.state is None else kept.state | {key: tensors[_key(*at, key)] for key in kept.tensors}
        for at, kept in entries.items()
    }


def _read(path: Path) -> _Saved:
    """Read ``strategy.json`` and check all that it says.

    Raises:
        StorageError: it is missing or damaged.
    """
    if not path.is_dir():
        raise StorageError(f"no saved strategy at {path}: the folder does not exist")
    where = path / FILE
    if (path / CARD).is_file() and not where.exists():
        raise StorageError(f"{path} holds a model alone: read it with AdapterModel.load, and make a strategy from it")
    plain = unsealed(read_json(where, schema_version=SCHEMA), where)
    with _blaming(where):
        saved = build(_Saved, plain, "strategy")
        if not saved.strategy.isidentifier():
            raise ConfigError(f"{shown(saved.strategy)} is no class")
    return saved


@contextmanager
def _blaming(where: Path, caught: type[Exception] = ClAdaptersError) -> Iterator[None]:
    """An error of type ``caught`` is the fault of the file ``where``.

    Raises:
        StorageError: in its place.
    """
    try:
        yield
    except (caught, RecursionError) as error:
        kind = "" if isinstance(error, ClAdaptersError) else f"{type(error).__name__}: "
        raise StorageError(f"{where} is damaged: {kind}{clipped(str(error), 300)}; restore a copy") from error


def _sha(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path)).hexdigest()
    except OSError as error:
        raise StorageError(f"{path} is missing or unreadable: {error.strerror or error}") from error


def _own_plugins(strategy: Any) -> list[Any]:
    """The user's, without those that Avalanche adds."""
    return [
        plugin
        for plugin in strategy.plugins
        if plugin is not strategy.evaluator and not isinstance(plugin, PeriodicEval | Clock)
    ]


def _name(thing: Any) -> str:
    return type(thing).__name__


def _key(where: str, number: int, key: str) -> str:
    return f"{where}.{number}.{key}"


def _value(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
