"""Saved models that were tampered with, and places that hold something else: one StorageError, and nothing is lost."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from cl_adapters._io import new_folder, put_tensors, sealed
from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import StorageError
from cl_adapters.index.arrays import read_array
from cl_adapters.interchange.peft_export import export_peft
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import moved_backbone
from cl_adapters.model.state import Origin
from cl_adapters.model.statistics import ClassStatistics
from cl_adapters.parts.keys import Keys, KeysConfig
from cl_adapters.pool import AdapterPool
from cl_adapters.predictors.self_refine import SelfRefine

MakeBackbone = Callable[..., FrozenBackbone]
Plain = dict[str, Any]
WIDTH = 16


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> MakeBackbone:
    return lambda seed=0: FrozenBackbone.wrap(tiny_vit(seed, width=WIDTH, heads=2, img_size=16, depth=2))


@pytest.fixture
def model(backbone: MakeBackbone, filled: Callable[..., AdapterBank]) -> AdapterModel:
    """Everything that a model can hold: two tasks, two adapters with origins, heads, names, statistics, keys."""
    encoder = backbone()
    made = AdapterModel(encoder, filled(encoder, LoRA(rank=2), slots=2))
    generator = torch.Generator().manual_seed(0)
    statistics = ClassStatistics.of_kind("full", WIDTH)
    keys = Keys(KeysConfig(held_out=0.0), WIDTH)
    for task, labels in enumerate(([4, 2], [9])):
        made.add_task(labels)
        made.head.grow(len(labels), generator)
        made.prototypes.append(torch.randn(len(labels), WIDTH, generator=generator))
        made.task_of_slot.append(task)
        for _ in labels:
            f_ND = torch.randn(5, WIDTH, generator=generator)
            statistics.add(f_ND)
            keys.add_class(f_ND, generator)
    made.returned, made.samples = {0: 1}, {0: 5}
    made.class_names = {4: "four", 9: "nine"}
    made.origins = {1: Origin(parents=(0,), merge={"method": "ema", "momentum": 0.1})}
    made.statistics = statistics
    made.parts["class_keys"] = keys
    made.predictor = SelfRefine()
    return made


@pytest.fixture
def saved(model: AdapterModel, tmp_path: Path) -> Path:
    return model.save(tmp_path / "runs" / "model")


def edit(saved: Path, change: Callable[[Plain], object]) -> None:
    """Change model.json and its checksum, so that only the change itself can be found."""
    plain = json.loads((saved / "model.json").read_text())
    change(plain)
    plain.pop("sha256", None)
    (saved / "model.json").write_text(json.dumps(sealed(plain)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- model.json ------------------------------------------------------------------------------------------------------

DEEP: Any = json.loads('{"a":' * 400 + "0" + "}" * 400)
WRONG: list[Any] = [None, True, -1, 2.5, 10**30, "x", [], [[]], {}, {"a": 1}, DEEP]
"""Values of every type that JSON has; where one fits, it is left out."""

FIELDS: dict[tuple[Any, ...], list[Any]] = {
    ("schema_version",): [*WRONG, 2],
    ("backbone",): WRONG,
    ("backbone", "name"): [*[w for w in WRONG if w != "x"], "\x1b[2J", "x" * 2000],
    ("backbone", "source"): [w for w in WRONG if w != {}],
    ("backbone", "fingerprint"): [*WRONG, "0" * 63],
    ("backbone", "num_features"): [*WRONG, 0, 17],
    ("backbone", "preprocessing"): [w for w in WRONG if w not in (None, {}, {"a": 1}, DEEP)],
    ("adapter",): WRONG,
    ("adapter", "type"): WRONG,
    ("adapter", "config"): [w for w in WRONG if w != {}],
    ("adapter", "config", "rank"): [*WRONG, 0, 3],
    ("adapter", "blocks"): [*WRONG, "abc", [0], [0, 0, 1], [1, 0], [0, 7], [True, 1], ["0", 1], [0, 10**30]],
    ("adapter", "slots"): [*WRONG, 0, 1, 3, 10**9, 2**62],
    ("adapter", "tasks"): [
        *[w for w in WRONG if w not in (None, [])],
        [0, 1, 2],
        [1, 0],
        [0, -1],
        [0, True],
        [0, "1"],
        [0, 10**9],
        "01",
    ],
    ("adapter", "origins"): [*[w for w in WRONG if w != {}], [1], {"2": {}}, {"-1": {}}, {"x": {}}, {"0": 3}],
    ("adapter", "origins", "1", "parents"): [*[w for w in WRONG if w != []], [2], [-1], [True], ["0"], [0.5]],
    ("adapter", "origins", "1", "merge"): [w for w in WRONG if w not in (None, {}, {"a": 1}, DEEP)],
    ("adapter", "origins", "1", "more"): [1],
    ("classes",): WRONG,
    ("classes", 0): WRONG,
    ("classes", 1, "label"): [*[w for w in WRONG if w != -1], 4, "2", 2.0, 2**63],
    ("classes", 0, "name"): [w for w in WRONG if w not in (None, "x")] + [False],
    ("classes", 1, "task"): [*WRONG, "0", 1.0, False],
    ("classes", 2, "task"): [*WRONG, 0, 2, 10**9, 2**62],
    ("classes", 0, "newest_task"): [*[w for w in WRONG if w is not None], 0, 2, 10**9, "1", 1.0],
    ("classes", 0, "samples"): [*[w for w in WRONG if w is not None], 0, "1", 1.0],
    ("classes", 0, "more"): [1],
    ("predictor",): WRONG,
    ("predictor", "type"): WRONG,
    ("predictor", "config"): [w for w in WRONG if w != {}],
    ("predictor", "config", "max_steps"): [*[w for w in WRONG if w != 10**30], 0],
    ("predictor", "config", "start"): WRONG,
    ("statistics",): [*WRONG, "diagonal"],
    ("parts",): WRONG,
    ("parts", "class_keys"): WRONG,
    ("parts", "class_keys", "type"): [*WRONG, "accumulation"],
    ("parts", "class_keys", "config"): [w for w in WRONG if w != {}],
    ("parts", "class_keys", "config", "kind"): WRONG,
    ("parts", "../class_keys"): [{"type": "keys"}],
    ("parts", "a.b"): [{"type": "keys"}],
    ("files",): [*WRONG, 3],
    ("files", "heads.safetensors"): [*WRONG, "0" * 64],
    ("files", "adapters/0001.safetensors"): WRONG,
    ("files", "statistics/0000.safetensors"): WRONG,
    ("files", "more.safetensors"): ["0" * 64],
    ("more",): [1],
}


def put(plain: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value at a path."""
    for step in path[:-1]:
        plain = plain[step]
    plain[path[-1]] = value


def leaves(plain: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    """Paths of all values that are no mappings, lists counted as one, as in :data:`FIELDS`."""
    if isinstance(plain, dict):
        return {leaf for key, value in plain.items() for leaf in leaves(value, (*path, key))}
    return {path}


def test_every_field_is_tried(saved: Path) -> None:
    """A field that is added to model.json has to be added above; a part's and a type's own options need not."""
    own = {("adapter", "config"), ("predictor", "config"), ("parts", "class_keys"), ("adapter", "origins"), ("files",)}
    plain = json.loads((saved / "model.json").read_text())
    wanted = {leaf for leaf in leaves(plain) if not any(leaf[: len(path)] == path for path in own)} | own
    wanted |= {("classes", 0, key) for key in plain["classes"][0]} - {("classes", 0, "label"), ("classes", 0, "task")}
    assert wanted - {("sha256",)} <= set(FIELDS)


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: "/".join(map(str, path)))
def test_a_wrong_value_is_one_error_that_names_file_and_field(
    saved: Path, backbone: MakeBackbone, path: tuple[Any, ...]
) -> None:
    encoder, whole = backbone(), (saved / "model.json").read_text()
    for value in FIELDS[path]:
        (saved / "model.json").write_text(whole)
        edit(saved, functools.partial(put, path=path, value=value))
        with pytest.raises(StorageError) as caught:
            AdapterModel.load(saved, encoder)
        message = str(caught.value)
        assert type(caught.value) is StorageError, message
        assert str(saved) in message and len(message) < 1000, message
        words = {str(step).partition("_")[0] for step in path if isinstance(step, str)}
        words |= {word.removesuffix("s") for word in words} | {"statistics/", "heads", "adapters/"}
        assert any(word in message for word in words), (path, value, message)


@pytest.mark.parametrize("depth", [500, 900, 5000, 100_000])
@pytest.mark.parametrize("key", ["classes", "files", "more", "adapter"])
def test_deeply_nested_json(saved: Path, backbone: MakeBackbone, depth: int, key: str) -> None:
    plain = json.loads((saved / "model.json").read_text())
    plain[key] = "HERE"
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = json.dumps(plain).replace('"HERE"', opening * depth + "0" + closing * depth)
        (saved / "model.json").write_text(text)
        with pytest.raises(StorageError, match=r"model\.json"):
            AdapterModel.load(saved, backbone())


def test_any_change_of_model_json_is_noticed_by_its_checksum(saved: Path, backbone: MakeBackbone) -> None:
    plain = json.loads((saved / "model.json").read_text())
    for change in (("classes", 0, "name"), ("classes", 0, "label"), ("backbone", "name"), ("sha256",)):
        altered = json.loads(json.dumps(plain))
        put(altered, change, 77 if change[-1] == "label" else "other")
        (saved / "model.json").write_text(json.dumps(altered))
        with pytest.raises(StorageError, match=r"model\.json was altered: its SHA-256 is not the recorded one"):
            AdapterModel.load(saved, backbone())
    (saved / "model.json").write_text(json.dumps(dict(reversed(plain.items()))))
    assert AdapterModel.load(saved, backbone()).class_names == {4: "four", 9: "nine"}, "only the layout has changed"


def test_without_a_checksum_the_values_are_checked_all_the_same(saved: Path, backbone: MakeBackbone) -> None:
    """As an older release wrote it."""
    plain = json.loads((saved / "model.json").read_text())
    del plain["sha256"]
    (saved / "model.json").write_text(json.dumps(plain))
    assert AdapterModel.load(saved, backbone()).task_of_slot == [0, 1]
    plain["classes"][1]["label"] = 4
    (saved / "model.json").write_text(json.dumps(plain))
    with pytest.raises(StorageError, match="class label 4 is there twice"):
        AdapterModel.load(saved, backbone())
    del plain["adapter"]["tasks"], plain["adapter"]["origins"]  # which still older ones do not have
    plain["classes"][1]["label"] = 2
    (saved / "model.json").write_text(json.dumps(plain))
    assert AdapterModel.load(saved, backbone()).task_of_slot == [0, 1]


@pytest.mark.parametrize("source", [{"name": 3}, {"weights": "w"}, {"name": "vit_glyph_tiny", "a": 1}, {"a": 1}])
def test_a_source_that_is_none(saved: Path, tmp_path: Path, source: Plain) -> None:
    edit(saved, lambda plain: plain["backbone"].update(source=source))
    for load in (AdapterModel.load, lambda path: moved_backbone(path, tmp_path / "w.safetensors")):
        with pytest.raises(StorageError, match=r"model\.json.*source"):
            load(saved)


# --- tensors ---------------------------------------------------------------------------------------------------------


def forge(saved: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Other tensors in a file, with the right SHA-256 everywhere."""
    tensors = load_file(saved / name)
    change(tensors)
    content = safetensors(tensors)
    (saved / name).write_bytes(content)
    edit(saved, lambda plain: plain["files"].update({name: sha256(content).hexdigest()}))


HEADS, ADAPTER, STATISTICS = "heads.safetensors", "adapters/0001.safetensors", "statistics/0000.safetensors"


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        *[(HEADS, "linear.weight", change) for change in ("double", "rank", "width", "rows", "int", "gone", "scalar")],
        *[(HEADS, "linear.bias", change) for change in ("double", "rank", "rows", "gone", "scalar")],
        *[(HEADS, "prototypes", change) for change in ("double", "rank", "width", "rows", "gone", "scalar")],
        *[(ADAPTER, "blocks.1.attn.query/a", change) for change in ("double", "rank", "width", "int", "gone")],
        *[(STATISTICS, "means", change) for change in ("double", "rank", "width", "rows", "gone", "scalar")],
        *[(STATISTICS, "spread.1", change) for change in ("double", "rank", "width", "rows", "gone")],
        *[(name, "more", "more") for name in (HEADS, ADAPTER, STATISTICS)],
    ],
)
def test_tensors_that_are_not_those_of_the_model(
    saved: Path, backbone: MakeBackbone, name: str, key: str, change: str
) -> None:
    if name == ADAPTER and key != "more":
        key = next(iter(load_file(saved / name)))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "double": lambda value: value.double(),
        "int": lambda value: value.long(),
        "rank": lambda value: value[None].contiguous(),
        "width": lambda value: value[..., :-1].contiguous(),
        "rows": lambda value: value[1:].contiguous(),
        "scalar": lambda value: torch.tensor(1.0),
    }

    def alter(tensors: dict[str, Tensor]) -> None:
        if change == "gone":
            del tensors[key]
        else:
            tensors[key] = torch.ones(2) if change == "more" else changes[change](tensors[key])

    forge(saved, name, alter)
    with pytest.raises(StorageError) as caught:
        AdapterModel.load(saved, backbone())
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [HEADS, ADAPTER, STATISTICS, "parts/class_keys.safetensors"])
def test_numbers_that_are_not_finite_are_not_read(
    saved: Path, backbone: MakeBackbone, name: str, number: float
) -> None:
    key = next(key for key, value in load_file(saved / name).items() if value.is_floating_point() and value.numel())
    forge(saved, name, lambda tensors: tensors[key].view(-1)[-1:].fill_(number))
    with pytest.raises(StorageError, match=rf"{saved / name}: tensor '{key}' has NaN or infinite values"):
        AdapterModel.load(saved, backbone())


def test_numbers_that_are_not_finite_are_not_written(saved: Path, model: AdapterModel) -> None:
    """A model that could not be loaded never takes the place of one that can."""
    before = contents(saved.parent)
    with torch.no_grad():
        model.head.weight[1, 2] = float("nan")
    with pytest.raises(StorageError, match=r"heads\.safetensors: tensor 'linear\.weight' has NaN"):
        model.save(saved, overwrite=True)
    assert contents(saved.parent) == before


# --- what is replaced ------------------------------------------------------------------------------------------------


def thesis(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("ten years of work")


def file(place: Path) -> None:
    place.write_text("a plain file")


def link(place: Path) -> None:
    thesis(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


def linked_marks(place: Path) -> None:
    thesis(place)
    for name in ("model.json", "heads.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        (place / name).symlink_to(place / "thesis.tex")


def folders_of_that_name(place: Path) -> None:
    for name in ("model.json", "heads.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        (place / name).mkdir(parents=True)


def someone_elses_model(place: Path) -> None:
    thesis(place)
    (place / "model.json").write_text("{}")  # of TensorFlow.js, or a pool
    (place / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("make", [thesis, file, link, linked_marks, folders_of_that_name, someone_elses_model])
@pytest.mark.parametrize("kind", ["model", "peft"])
def test_only_the_same_kind_is_overwritten(
    model: AdapterModel, tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    place = tmp_path / "precious"
    make(place)
    before, linked = contents(tmp_path), place.is_symlink()
    with pytest.raises(StorageError, match=rf"{place} is (a link|no folder|a folder without a file .*); overwrite"):
        save(model, place, kind)
    assert contents(tmp_path) == before and place.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked, "no scratch folder is left"


@pytest.mark.parametrize("kind", ["model", "peft"])
def test_the_same_kind_and_empty_folders_are_overwritten(model: AdapterModel, tmp_path: Path, kind: str) -> None:
    (tmp_path / "place").mkdir()
    for _ in range(2):
        assert len(contents(save(model, tmp_path / "place", kind))) >= 3
    assert len(list(tmp_path.iterdir())) == 1


def save(model: AdapterModel, place: Path, kind: str) -> Path:
    if kind == "model":
        return model.save(place, overwrite=True)
    assert model.bank is not None
    return export_peft(place, model.bank.export(0), model.bank.adapter, model.backbone, overwrite=True)


def test_a_pool_is_not_overwritten_by_a_model(model: AdapterModel, tmp_path: Path) -> None:
    """It has a model.json too."""
    model.save_pool(tmp_path / "pool")
    with pytest.raises(StorageError, match="is a folder without a file heads"):
        model.save(tmp_path / "pool", overwrite=True)
    assert len(AdapterPool.open(tmp_path / "pool").ids) == 2


def test_what_comes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    scratch = new_folder(tmp_path / "new")
    put_tensors(scratch.__enter__(), "a.safetensors", {"a": torch.ones(2)})
    thesis(tmp_path / "new")
    with pytest.raises(StorageError, match="exists already"):
        scratch.__exit__(None, None, None)
    assert (tmp_path / "new" / "thesis.tex").is_file()


# --- special files ---------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def own_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # such names are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.fixture
def bounded() -> Iterator[None]:
    """A reader that waits, or reads without end, is interrupted after some seconds and fails."""

    def stop(*_: object) -> None:
        raise AssertionError("it waited")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [pipe, endless, own_socket])
@pytest.mark.parametrize("name", ["model.json", HEADS, ADAPTER, STATISTICS, "parts/class_keys.safetensors"])
def test_no_special_file_of_a_model_is_waited_for(
    saved: Path, backbone: MakeBackbone, name: str, make: Callable[[Path], None], bounded: None
) -> None:
    (saved / name).unlink()
    make(saved / name)
    with pytest.raises(StorageError, match=rf"{saved / name} (is missing or unreadable|cannot be read)"):
        AdapterModel.load(saved, backbone())


@pytest.mark.parametrize("make", [pipe, endless, own_socket])
def test_no_special_file_is_taken_for_an_array(tmp_path: Path, make: Callable[[Path], None], bounded: None) -> None:
    make(tmp_path / "x.npy")
    for mmap in (True, False):
        with pytest.raises(StorageError, match=r"is missing, damaged or no \.npy array"):
            read_array(tmp_path / "x.npy", "float32", (None,), mmap=mmap)


def test_links_to_files_are_read(saved: Path, backbone: MakeBackbone, tmp_path: Path) -> None:
    for name in ("model.json", HEADS, ADAPTER):
        (saved / name).rename(tmp_path / Path(name).name)
        (saved / name).symlink_to(tmp_path / Path(name).name)
    assert AdapterModel.load(saved, backbone()).classes == [4, 2, 9]


def test_half_a_character_in_json(saved: Path, backbone: MakeBackbone) -> None:
    text = (saved / "model.json").read_text()
    plain = json.loads(text)
    plain["classes"][0]["name"] = "\ud800"
    (saved / "model.json").write_text(json.dumps(plain))
    with pytest.raises(StorageError, match=r"model\.json cannot be read as JSON: .*surrogates not allowed"):
        AdapterModel.load(saved, backbone())
    plain["classes"][0]["name"] = "\U0001f600"
    (saved / "model.json").write_text(json.dumps(sealed({k: v for k, v in plain.items() if k != "sha256"})))
    assert "\U0001f600" in AdapterModel.load(saved, backbone()).class_names.values()


def test_heads_in_half_precision_answer_as_their_numbers_say(saved: Path, backbone: MakeBackbone) -> None:
    """Whoever halves a file on disk gets rounded numbers, and no error at the first input."""
    heads = saved / "heads.safetensors"
    halved = {key: value.half() for key, value in load_file(heads).items()}
    heads.write_bytes(safetensors(halved))
    edit(saved, lambda plain: plain["files"].update({heads.name: sha256(heads.read_bytes()).hexdigest()}))
    model = AdapterModel.load(saved, backbone())
    assert torch.equal(model.head.weight, halved["linear.weight"].float())
    assert model(torch.zeros(2, 3, 16, 16)).isfinite().all()
