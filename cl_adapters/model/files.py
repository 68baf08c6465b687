"""Classifier on disk.

    model.json                    schema, backbone identity, adapter type, classes, predictor, SHA-256 of every file
    heads.safetensors             linear.weight [C, D], linear.bias [C], prototypes [C, D]
    adapters/0000.safetensors     one per slot, keyed "blocks.3.ffn/down"
    statistics/0000.safetensors   one per task: means and spreads of its classes
    parts/NAME.safetensors        what else the strategy keeps

Adapters and statistics of finished tasks never change, so a later save may hard-link them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cl_adapters._io import get_tensors, new_folder, put_tensors, read_json, write_json
from cl_adapters.adapters import adapters
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.load import moved_source
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.config import build, to_plain
from cl_adapters.errors import IncompatibleBackbone, StorageError
from cl_adapters.model.classifier import Classifier
from cl_adapters.model.state import Origin
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts import Part, parts
from cl_adapters.parts.keys import check_own_keys
from cl_adapters.predictors import predictors

SCHEMA = 1
TRIES = 100
"""How often a model that is saved while it is read is read anew."""
M = TypeVar("M", bound=Classifier)


def save_model(model: Classifier, path: Path, *, overwrite: bool = False, link_from: Path | None = None) -> Path:
    """Write ``model`` as the folder ``path``; see :meth:`AdapterModel.save`."""
    with new_folder(path, overwrite=overwrite) as folder:
        files = {name: put_tensors(folder, name, tensors, link_from) for name, tensors in _tensors(model).items()}
        write_json(folder / "model.json", _describe(model) | {"files": files})
    return path


def load_model(cls: type[M], path: Path, backbone: FrozenBackbone | None = None) -> M:
    """Read the folder ``path`` into a new ``cls``, anew where it is saved meanwhile; see :meth:`AdapterModel.load`."""
    for _ in range(TRIES):
        stamp = _stamp(path)
        try:
            return _load(cls, path, backbone)
        except StorageError:  # perhaps the files of two saves
            if _stamp(path) == stamp:
                raise
    raise StorageError(f"{path} is saved again and again while it is read; load it when the writer has finished")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a saved model from the one that takes its place."""
    try:
        found = (path / "model.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load(cls: type[M], path: Path, backbone: FrozenBackbone | None) -> M:
    if not path.is_dir():
        raise StorageError(f"no saved model at {path}: the folder does not exist")
    card = read_json(path / "model.json", schema_version=SCHEMA)
    try:
        return _assemble(cls, path, card, _backbone(BackboneCard(**card["backbone"]), backbone))
    except (KeyError, TypeError, IndexError) as error:
        raise StorageError(f"{path / 'model.json'} is incomplete: {type(error).__name__} {error}") from error


def moved_backbone(path: Path, place: Path) -> FrozenBackbone:
    """The backbone of a saved model, whose own weights file (of transformers: folder) is now ``place``.

    Raises:
        StorageError: no saved model there.
        BackboneUnavailable, IncompatibleBackbone: nothing can be loaded from ``place``.
    """
    card = BackboneCard(**read_json(path / "model.json", schema_version=SCHEMA)["backbone"])
    _check_named(card)
    return FrozenBackbone.load(**moved_source(card.source, place))


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
            {"label": label, "name": model.class_names.get(label), "task": int(task)}
            for label, task in zip(model.classes, model.task_of_column, strict=True)
        ],
        "predictor": {"type": predictors.name_of(model.predictor), "config": to_plain(model.predictor)},
        "statistics": None if model.statistics is None else model.statistics.kind,
        "parts": {
            name: {"type": parts.name_of(part), **part.description()}
            for name, part in model.parts.items()
            if isinstance(part, Part)
        },
    }


def _tensors(model: Classifier) -> dict[str, dict[str, Tensor]]:
    """File name to tensors."""
    linear = {"linear.weight": model.head.weight, "linear.bias": model.head.bias}
    files = {"heads.safetensors": {**linear, "prototypes": model.prototypes.prototypes}}
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
            files[f"statistics/{task:04d}.safetensors"] = spreads | {"means": everything["means"][rows]}
    return files


def _backbone(card: BackboneCard, given: FrozenBackbone | None) -> FrozenBackbone:
    if given is None:
        _check_named(card)
        given = FrozenBackbone.load(**card.source)
    card.check(given)
    return given


def _check_named(card: BackboneCard) -> None:
    if not card.source:
        raise IncompatibleBackbone(
            f"this model was trained on a wrapped module ({card.name}), which cannot be loaded by name: "
            "pass it as backbone=FrozenBackbone.wrap(module, ...)"
        )


def _assemble(cls: type[M], path: Path, card: Mapping[str, Any], backbone: FrozenBackbone) -> M:
    files = card["files"]

    def read(name: str) -> dict[str, Tensor]:
        return get_tensors(path / name, files[name])

    model = cls(backbone, _bank(card["adapter"], backbone, read))
    for row in card["classes"]:
        model.classes.append(int(row["label"]))
        if row["name"] is not None:
            model.class_names[int(row["label"])] = row["name"]
    model.task_of_column = torch.tensor([int(row["task"]) for row in card["classes"]], dtype=torch.long)
    heads = read("heads.safetensors")
    model.head.weight = nn.Parameter(heads["linear.weight"].to(model.device))
    model.head.bias = nn.Parameter(heads["linear.bias"].to(model.device))
    model.prototypes.prototypes = heads["prototypes"].to(model.device)
    for head, rows in (("linear", model.head.num_classes), ("prototype", model.prototypes.num_classes)):
        if rows not in (0, len(model.classes)):
            raise StorageError(f"{path} names {len(model.classes)} classes, but its {head} head has {rows}")
    if card["adapter"] is not None:
        model.task_of_slot = [int(task) for task in card["adapter"].get("tasks", range(model.num_slots))]
        origins = card["adapter"].get("origins", {})
        model.origins = {int(slot): build(Origin, plain, "origin") for slot, plain in origins.items()}
    for name, described in card.get("parts", {}).items():
        model.parts[name] = parts.get(described["type"]).restore(described, read(f"parts/{name}.safetensors"))
    model.predictor = build(predictors.get(card["predictor"]["type"]), card["predictor"]["config"], "predictor")
    if card["statistics"] is not None:
        model.statistics = ClassStatistics.of_kind(card["statistics"], backbone.num_features)
        tasks = [read(name) for name in sorted(files) if name.startswith("statistics/")]
        merged = {key: value for task in tasks for key, value in task.items() if key != "means"}
        empty = [model.statistics.means_CD]
        model.statistics.load(merged | {"means": torch.cat([task["means"] for task in tasks] or empty)})
    return model


def _bank(card: Mapping[str, Any] | None, backbone: FrozenBackbone, read: Any) -> AdapterBank | None:
    if card is None:
        return None
    adapter = build(adapters.get(card["type"]), card["config"], "adapter")
    bank = AdapterBank(backbone, adapter, blocks=card["blocks"])
    for slot in range(card["slots"]):
        bank.add_slot(read(f"adapters/{slot:04d}.safetensors"))
        bank.freeze(slot)
    return bank


def stored_bytes(model: Classifier) -> int:
    """Bytes of all tensors that :func:`save_model` writes."""
    return sum(value.numel() * value.element_size() for part in _tensors(model).values() for value in part.values())
