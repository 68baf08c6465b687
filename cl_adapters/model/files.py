"""Classifier on disk.

    model.json                    schema, backbone identity, adapter type, classes, predictor, SHA-256 of every file
                                  and of its own content (older ones are without that)
    heads.safetensors             linear.weight [C, D], linear.bias [C], prototypes [C, D]
    adapters/0000.safetensors     one per slot, keyed "blocks.3.ffn/down"
    statistics/0000.safetensors   one per task: means and spreads of the classes that first came in it
    parts/NAME.safetensors        what else the strategy keeps

Adapters of finished tasks never change, nor do statistics of classes that do not return, so a later save may hard-link
them. Nothing in ``model.json`` is believed: every value is checked, and the tensors against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cl_adapters._forms import SHA, Count, Label, check_label, clipped, shown
from cl_adapters._io import get_tensors, new_folder, put_tensors, read_json, read_settled, sealed, unsealed, write_json
from cl_adapters.adapters import adapters
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.load import moved_source
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone, StorageError
from cl_adapters.model.classifier import Classifier
from cl_adapters.model.state import Origin
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts import Part, parts
from cl_adapters.parts.keys import check_own_keys
from cl_adapters.predictors import predictors

SCHEMA = 1
CARD = "model.json"
HEADS = "heads.safetensors"
TASKS = 1 << 20
"""No model has learned so many tasks; a larger number is damage."""
Shape = tuple[int | None, ...]
"""Of a tensor; None: any length."""
SPREADS: dict[str, Callable[[int], Shape]] = {
    "full": lambda width: (width, width),
    "diagonal": lambda width: (width,),
    "low_rank": lambda width: (None, width),
}
"""Shape of what each kind of statistics keeps of a class, for features of a width."""
M = TypeVar("M", bound=Classifier)
Read = Callable[[str], dict[str, Tensor]]
"""Gives the tensors of a file by its name in the folder."""


@dataclass(frozen=True, kw_only=True)
class _Class:
    """One class of ``model.json``; their order is that of the columns.

    ``newest_task`` (where it is not ``task``) and ``samples`` (where they were counted) came later than files in use.
    """

    label: Label
    name: str | None
    task: Count
    newest_task: Count | None = None
    samples: Count | None = None

    def __post_init__(self) -> None:
        check_label(self.label, ConfigError)
        if self.newest_task is not None and not self.task < self.newest_task < TASKS:
            raise ConfigError(f"newest_task of class {self.label} is {self.newest_task}, its task {self.task}")
        if self.samples == 0:
            raise ConfigError(f"samples of class {self.label} are none")


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """The bank in ``model.json``. ``tasks`` and ``origins`` came later than files in use."""

    type: str
    config: dict[str, Any]
    blocks: tuple[Count, ...]
    slots: Count
    tasks: tuple[Count, ...] | None = None
    origins: dict[int, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = range(self.slots)
        if self.tasks is not None and len(self.tasks) > self.slots:
            raise ConfigError(f"tasks has {len(self.tasks)} entries for {self.slots} slots")
        _check_tasks(self.tasks or ())
        for slot, origin in self.origins.items():
            absent = [number for number in (slot, *origin.parents) if number not in known]
            if absent:
                raise ConfigError(f"origins names slot {absent[0]}, but there are {self.slots}")


@dataclass(frozen=True, kw_only=True)
class _Predictor:
    """The predictor in ``model.json``."""

    type: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Card:
    """``model.json``, each value in its form."""

    schema_version: int
    backbone: BackboneCard
    adapter: _Adapter | None
    classes: tuple[_Class, ...]
    predictor: _Predictor
    statistics: str | None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str]

    def __post_init__(self) -> None:
        self.backbone.check_form(ConfigError)
        _check_tasks([row.task for row in self.classes])
        labels = set()
        for row in self.classes:
            if row.label in labels:
                raise ConfigError(f"class label {row.label} is there twice")
            labels.add(row.label)
        for name, described in self.parts.items():
            if not name or set(name) & set("./\\") or not isinstance(described.get("type"), str):
                raise ConfigError(f"part {shown(name)} has a name or type that is none")
        for name, sha in self.files.items():
            if not SHA.fullmatch(sha):
                raise ConfigError(f"files: {shown(sha)} of {shown(name)} is no SHA-256")

    def names(self) -> Iterator[str]:
        """Files that there have to be."""
        yield HEADS
        yield from (f"parts/{name}.safetensors" for name in self.parts)
        yield from (f"adapters/{slot:04d}.safetensors" for slot in range(self.adapter.slots if self.adapter else 0))
        yield from (_statistics_file(task) for task in range(0 if self.statistics is None else self.num_tasks))

    @property
    def num_tasks(self) -> int:
        """Tasks, some perhaps without classes."""
        return max((row.newest_task or row.task for row in self.classes), default=-1) + 1


def _check_tasks(tasks: Sequence[int]) -> None:
    if list(tasks) != sorted(tasks) or max(tasks, default=0) >= TASKS:
        raise ConfigError(f"tasks are numbers that rise, below {TASKS}; got {shown(list(tasks))}")


def save_model(model: Classifier, path: Path, *, overwrite: bool = False, link_from: Path | None = None) -> Path:
    """Write ``model`` as the folder ``path``; see :meth:`AdapterModel.save`."""
    with new_folder(path, replaces=(CARD, HEADS) if overwrite else ()) as folder:  # a pool has a model.json too
        files = {name: put_tensors(folder, name, tensors, link_from) for name, tensors in _tensors(model).items()}
        content = _describe(model) | {"files": files}
        write_json(folder / CARD, sealed(content))
    return path


def load_model(cls: type[M], path: Path, backbone: FrozenBackbone | None = None) -> M:
    """Read the folder ``path`` into a new ``cls``, anew where it is saved meanwhile; see :meth:`AdapterModel.load`."""
    return read_settled(path / CARD, lambda: _load(cls, path, backbone))


def _load(cls: type[M], path: Path, backbone: FrozenBackbone | None) -> M:
    if not path.is_dir():
        raise StorageError(f"no saved model at {path}: the folder does not exist")
    card = _read_card(path / CARD)
    return _assemble(cls, path, card, _backbone(path, card.backbone, backbone))


def moved_backbone(path: Path, place: Path) -> FrozenBackbone:
    """The backbone of a saved model, whose own weights file (of transformers: folder) is now ``place``.

    Raises:
        StorageError: no saved model there.
        BackboneUnavailable, IncompatibleBackbone: nothing can be loaded from ``place``.
    """
    card = _read_card(path / CARD).backbone
    _check_named(card)
    return replace(card, source=moved_source(card.source, place)).opened(str(path / CARD), StorageError)


def _read_card(where: Path) -> _Card:
    """Read ``model.json`` and check all that it says.

    Raises:
        StorageError: it is damaged.
    """
    plain = unsealed(read_json(where, schema_version=SCHEMA), where)
    try:
        needed = ("backbone", "adapter", "classes", "predictor", "statistics", "files")
        absent = [key for key in needed if key not in plain]
        card = None if absent else build(_Card, plain, "model")
    except (ConfigError, RecursionError) as error:
        raise StorageError(f"{where} is damaged or incomplete: {clipped(str(error), 300)}; restore a copy") from error
    if card is not None:
        absent = list(islice((name for name in card.names() if name not in card.files), 1))
    if card is None or absent:
        raise StorageError(f"{where} is incomplete: KeyError {absent[0]!r}; restore a copy")
    return card


def _describe(model: Classifier) -> dict[str, Any]:
    bank = model.bank
    return {
        "schema_version": SCHEMA,
        "backbone": to_plain(BackboneCard.of(model.backbone)),
        "adapter": None
        if bank is None
        else {
            "type": adapters.name_of(bank.adapter),
            "config": to_plain(bank.adapter),
            "blocks": list(bank.blocks),
            "slots": bank.num_slots,
            "tasks": model.task_of_slot,
            "origins": {str(slot): to_plain(origin) for slot, origin in sorted(model.origins.items())},
        },
        "classes": [
            {"label": label, "name": model.class_names.get(label), "task": int(task), **_later(model, column)}
            for column, (label, task) in enumerate(zip(model.classes, model.task_of_column, strict=True))
        ],
        "predictor": {"type": predictors.name_of(model.predictor), "config": to_plain(model.predictor)},
        "statistics": None if model.statistics is None else model.statistics.kind,
        "parts": {
            name: {"type": parts.name_of(part), **part.description()}
            for name, part in model.parts.items()
            if isinstance(part, Part)
        },
    }


def _later(model: Classifier, column: int) -> dict[str, int]:
    """What is said of a class only where it is known."""
    found = {"newest_task": model.returned.get(column), "samples": model.samples.get(column)}
    return {key: value for key, value in found.items() if value is not None}


def _tensors(model: Classifier) -> dict[str, dict[str, Tensor]]:
    """File name to tensors."""
    linear = {"linear.weight": model.head.weight, "linear.bias": model.head.bias}
    files = {HEADS: {**linear, "prototypes": model.prototypes.prototypes}}
    check_own_keys(model)  # before adapters are loaded
    for name, part in model.parts.items():
        assert isinstance(part, Part)
        files[f"parts/{name}.safetensors"] = part.tensors()
    for slot in range(model.num_slots):
        assert model.bank is not None
        files[f"adapters/{slot:04d}.safetensors"] = model.bank.export(slot)
    if model.statistics is not None:
        everything = model.statistics.tensors()
        for task in range(model.num_tasks):
            rows = (model.task_of_column == task).nonzero().flatten().tolist()
            rows = [row for row in rows if row < model.statistics.num_classes]
            spreads = {f"spread.{row}": everything[f"spread.{row}"] for row in rows}
            files[_statistics_file(task)] = spreads | {"means": everything["means"][rows]}
    return files


def _statistics_file(task: int) -> str:
    return f"statistics/{task:04d}.safetensors"


def _backbone(path: Path, card: BackboneCard, given: FrozenBackbone | None) -> FrozenBackbone:
    if given is None:
        _check_named(card)
        given = card.opened(str(path / CARD), StorageError)
    card.check(given)
    if card.num_features != given.num_features:
        raise StorageError(
            f"{path / CARD} is damaged: backbone.num_features is {card.num_features}, that backbone has "
            f"{given.num_features}; restore a copy"
        )
    return given


def _check_named(card: BackboneCard) -> None:
    if not card.source:
        raise IncompatibleBackbone(
            f"this model was trained on a wrapped module ({card.name}), which cannot be loaded by name: "
            "pass it as backbone=FrozenBackbone.wrap(module, ...)"
        )


def _assemble(cls: type[M], path: Path, card: _Card, backbone: FrozenBackbone) -> M:
    width, where = backbone.num_features, path / CARD

    def read(name: str) -> dict[str, Tensor]:
        return get_tensors(path / name, card.files[name])

    model = cls(backbone, None if card.adapter is None else _bank(path, card.adapter, backbone, read))
    model.classes = [row.label for row in card.classes]
    model.class_names = {row.label: row.name for row in card.classes if row.name is not None}
    model.task_of_column = torch.tensor([row.task for row in card.classes], dtype=torch.long)
    known = list(enumerate(card.classes))
    model.returned = {column: row.newest_task for column, row in known if row.newest_task is not None}
    model.samples = {column: row.samples for column, row in known if row.samples is not None}
    heads = read(HEADS)
    bias = (_rows(heads, "linear.weight"),)
    shapes = {"linear.weight": (None, width), "linear.bias": bias, "prototypes": (None, width)}
    _check_tensors(path / HEADS, heads, shapes, backbone)
    for head, rows in (("linear", *bias), ("prototype", len(heads["prototypes"]))):
        if rows not in (0, len(model.classes)):
            raise StorageError(f"{path} names {len(model.classes)} classes, but its {head} head has {rows}")
    strange = sorted(set(card.files) - set(card.names()))
    if strange:
        raise StorageError(
            f"{where} is damaged: {shown(strange[0])} in its files belongs to nothing in it; restore a copy"
        )
    own = next(backbone.encoder.parameters()).dtype  # half precision under wider features would fail at the first input
    heads = {key: value.to(model.device, torch.promote_types(value.dtype, own)) for key, value in heads.items()}
    model.head.weight, model.head.bias = nn.Parameter(heads["linear.weight"]), nn.Parameter(heads["linear.bias"])
    model.prototypes.prototypes = heads["prototypes"]
    if card.adapter is not None:
        tasks = card.adapter.tasks
        model.task_of_slot = list(range(model.num_slots) if tasks is None else tasks)
        model.origins = dict(card.adapter.origins)
    for name, described in card.parts.items():
        tensors = read(f"parts/{name}.safetensors")
        with _blaming(where, f"part {name!r}", Exception):  # plug-ins; what contradicts itself surfaces in many ways
            part = parts.get(described["type"]).restore(described, tensors)
            part.check(len(model.classes), width)
            model.parts[name] = part
    with _blaming(where, "predictor"):
        model.predictor = build(predictors.get(card.predictor.type), card.predictor.config, "predictor")
    if card.statistics is not None:
        kind: Any = card.statistics
        with _blaming(where, "statistics"):
            model.statistics = ClassStatistics.of_kind(kind, width)
        model.statistics.load(_statistics(path, card, SPREADS[kind](width), backbone, read))
    return model


def _bank(path: Path, card: _Adapter, backbone: FrozenBackbone, read: Read) -> AdapterBank:
    with _blaming(path / CARD, "adapter"):
        adapter = build(adapters.get(card.type), card.config, "adapter")
        bank = AdapterBank(backbone, adapter, blocks=card.blocks)
        if bank.blocks != card.blocks:
            raise ConfigError(f"blocks {list(card.blocks)} are out of order, or there twice")
        for slot in range(card.slots):
            name = f"adapters/{slot:04d}.safetensors"
            tensors = read(name)
            _check_dtypes(path / name, tensors, backbone)
            bank.add_slot(tensors)
            bank.freeze(slot)
    return bank


def _statistics(path: Path, card: _Card, spread: Shape, backbone: FrozenBackbone, read: Read) -> dict[str, Tensor]:
    """The tensors of all tasks in one, each task's checked against its classes; ``spread``: shape of a class's."""
    width = backbone.num_features
    merged: dict[str, Tensor] = {}
    means = [torch.empty(0, width)]
    known = 0
    for task in range(card.num_tasks):
        name = _statistics_file(task)
        tensors = read(name)
        columns = [column for column, row in enumerate(card.classes) if row.task == task]
        rows = _rows(tensors, "means")
        # In training the newest classes have none yet; those before them all have.
        shapes = {f"spread.{column}": spread for column in columns[:rows]}
        _check_tensors(path / name, tensors, shapes | {"means": (len(shapes), width)}, backbone)
        if shapes and known != columns[0]:
            raise StorageError(f"{path / name} has statistics, but classes before its own have none; restore a copy")
        known += rows
        means.append(tensors.pop("means"))
        merged |= tensors
    return merged | {"means": torch.cat(means)}


def _rows(tensors: Mapping[str, Tensor], key: str) -> int:
    return len(tensors[key]) if key in tensors and tensors[key].ndim else 0


@contextmanager
def _blaming(where: Path, field: str, caught: type[Exception] = ClAdaptersError) -> Iterator[None]:
    """An error of type ``caught`` is the fault of that field of the file ``where``.

    Raises:
        StorageError: in its place.
    """
    try:
        yield
    except StorageError:  # names its own file
        raise
    except caught as error:
        kind = "" if isinstance(error, ClAdaptersError) else f"{type(error).__name__}: "
        raise StorageError(f"{where}: its {field} cannot be used: {kind}{clipped(str(error), 300)}") from error


def _check_tensors(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], backbone: FrozenBackbone
) -> None:
    """Check names, shapes (None: any length) and types of a file's tensors.

    Raises:
        StorageError: names the first that is another.
    """
    for key in sorted(shapes.keys() | tensors.keys()):
        found = list(tensors[key].shape) if key in tensors else None
        wanted = list(shapes[key]) if key in shapes else None
        fits = found is not None and wanted is not None and len(found) == len(wanted)
        if not fits or any(n not in (None, m) for n, m in zip(wanted or (), found or (), strict=True)):
            expected = None if wanted is None else ["any" if n is None else n for n in wanted]
            raise StorageError(f"{where}: tensor {shown(key)}: expected {expected}, got {found}; restore a copy")
    _check_dtypes(where, tensors, backbone)


def _check_dtypes(where: Path, tensors: Mapping[str, Tensor], backbone: FrozenBackbone) -> None:
    """Check that tensors are float32, half precision, or of the backbone's own type where that is a wider one."""
    own = torch.promote_types(next(backbone.encoder.parameters()).dtype, torch.float32)
    for key, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, own):
            raise StorageError(f"{where}: tensor {shown(key)} is {value.dtype}; float32 is expected")


def stored_bytes(model: Classifier) -> int:
    """Bytes of all tensors that :func:`save_model` writes."""
    return sum(value.numel() * value.element_size() for part in _tensors(model).values() for value in part.values())
