"""Damaged, foreign and unwritable saves: one clear error each, and nothing that was saved before is lost."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters import _io as storage
from cl_adapters._io import get_tensors, new_folder, put_tensors
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone, StorageError
from cl_adapters.model import files as model_files
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.statistics import FullGaussian
from cl_adapters.predictors.self_refine import SelfRefine

MakeBackbone = Callable[..., FrozenBackbone]


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> MakeBackbone:
    return lambda seed=0: FrozenBackbone.wrap(tiny_vit(seed, width=16, heads=2, img_size=16, depth=2))


@pytest.fixture
def model(backbone: MakeBackbone, filled: Callable[..., AdapterBank]) -> AdapterModel:
    """Two tasks, two adapters, heads, statistics."""
    encoder = backbone()
    made = AdapterModel(encoder, filled(encoder, Bottleneck(bottleneck=4), slots=2))
    generator = torch.Generator().manual_seed(0)
    statistics = FullGaussian(16)
    for labels in ([4, 2], [9]):
        made.add_task(labels)
        made.head.grow(len(labels), generator)
        made.prototypes.append(torch.randn(len(labels), 16, generator=generator))
        for _ in labels:
            statistics.add(torch.randn(5, 16, generator=generator))
    made.statistics = statistics
    made.predictor = SelfRefine()
    return made


@pytest.fixture
def saved(model: AdapterModel, tmp_path: Path) -> Path:
    return model.save(tmp_path / "runs" / "model")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FILES = ["heads.safetensors", "adapters/0001.safetensors", "statistics/0000.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", ["truncated", "one bit", "missing", "empty", "a folder", "another file"])
def test_damaged_tensors(saved: Path, backbone: MakeBackbone, file: str, fault: str) -> None:
    path = saved / file
    content = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(content[:-7])
    elif fault == "one bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "another file":
        shutil.copy(saved / "adapters/0000.safetensors", path)
    else:
        path.unlink()
        if fault == "a folder":
            path.mkdir()
    before = contents(saved)
    with pytest.raises(StorageError, match=f"{path} (is missing or unreadable|was altered or truncated)"):
        AdapterModel.load(saved, backbone())
    assert contents(saved) == before, "loading writes nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "back', "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("\x00\x01", "cannot be read as JSON"),
        ("[]", "no schema_version; it was not written by cl-adapters"),
        ("{}", "no schema_version"),
        ('{"schema_version": "1"}', "no schema_version"),
        ('{"schema_version": NaN}', "NaN is not JSON"),
        ('{"schema_version": 2}', "has schema 2, this cl-adapters reads up to 1; upgrade cl-adapters"),
        ('{"schema_version": 1}', "is incomplete: KeyError 'backbone'"),
    ],
)
def test_damaged_description(saved: Path, backbone: MakeBackbone, content: str, message: str) -> None:
    (saved / "model.json").write_text(content)
    with pytest.raises(StorageError, match=message):
        AdapterModel.load(saved, backbone())


def edit(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change model.json and its checksum, so that only the change itself can be found."""
    card = json.loads((saved / "model.json").read_text())
    del card["sha256"]
    change(card)
    (saved / "model.json").write_text(json.dumps(storage.sealed(card)))


@pytest.mark.parametrize("key", ["backbone", "adapter", "classes", "predictor", "statistics", "files"])
def test_description_without_a_part(saved: Path, backbone: MakeBackbone, key: str) -> None:
    edit(saved, lambda card: card.pop(key))
    with pytest.raises(StorageError, match=f"model.json is incomplete: KeyError '{key}'"):
        AdapterModel.load(saved, backbone())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda c: c["adapter"].update(type="bottlenek"), StorageError, "did you mean 'bottleneck'"),
        (lambda c: c["predictor"].update(type="oracle"), StorageError, "unknown predictor 'oracle'"),
        (lambda c: c["adapter"]["config"].update(bottleneck=5), ClAdaptersError, "do not fit this bank"),
        (lambda c: c["adapter"].update(blocks=[0, 7]), ClAdaptersError, r"blocks \[7\] do not exist"),
        (lambda c: c["predictor"]["config"].update(steps=1), ClAdaptersError, "unknown option predictor.steps"),
        (lambda c: c["adapter"].update(slots=3), StorageError, "incomplete: KeyError 'adapters/0002.safetensors'"),
        (lambda c: c.update(classes=c["classes"][:2]), StorageError, "2 classes, but .* 3"),
        (lambda c: c["classes"][0].pop("task"), StorageError, "incomplete"),
        (lambda c: c.update(classes=5), StorageError, "incomplete"),
        (lambda c: c.update(statistics="ful"), StorageError, "unknown covariance 'ful'"),
    ],
)
def test_description_that_does_not_fit(
    saved: Path, backbone: MakeBackbone, change: Callable[[Any], object], kind: type[Exception], message: str
) -> None:
    edit(saved, change)
    with pytest.raises(kind, match=message):
        AdapterModel.load(saved, backbone())


def test_no_model_there(tmp_path: Path, backbone: MakeBackbone) -> None:
    with pytest.raises(StorageError, match=r"no saved model at .*nowhere: the folder does not exist"):
        AdapterModel.load(tmp_path / "nowhere", backbone())
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match=r"model\.json is missing"):
        AdapterModel.load(tmp_path / "empty", backbone())


def test_another_backbone_names_both_fingerprints(saved: Path, backbone: MakeBackbone, model: AdapterModel) -> None:
    other = backbone(seed=1)
    recorded, given = model.backbone.fingerprint[:16], other.fingerprint[:16]
    with pytest.raises(IncompatibleBackbone, match=f"fingerprint {recorded}.*has {given}"):
        AdapterModel.load(saved, other)


def test_wrapped_module_must_be_given(saved: Path) -> None:
    with pytest.raises(
        IncompatibleBackbone, match=r"cannot be loaded by name: pass it as backbone=FrozenBackbone\.wrap"
    ):
        AdapterModel.load(saved)


def test_whole_and_equal(saved: Path, backbone: MakeBackbone, model: AdapterModel) -> None:
    again = AdapterModel.load(saved, backbone())
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.statistics is not None and model.statistics is not None
    wanted = model.statistics.tensors()
    assert all(torch.equal(value, wanted[key]) for key, value in again.statistics.tensors().items())
    assert again.task_of_column.tolist() == [0, 0, 1]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_existing_folder_is_never_replaced_unasked(saved: Path, model: AdapterModel) -> None:
    before = contents(saved.parent)
    with pytest.raises(StorageError, match=r"exists already; choose another place or pass overwrite=True"):
        model.save(saved)
    assert contents(saved.parent) == before


def test_overwriting_swaps_the_whole_folder(saved: Path, model: AdapterModel, backbone: MakeBackbone) -> None:
    (saved / "stray").write_text("from before")
    model.add_task([1])
    model.head.grow(1, torch.Generator())
    model.prototypes.append(torch.ones(1, 16))
    model.statistics.add(torch.randn(3, 16))  # type: ignore[union-attr]
    model.save(saved, overwrite=True)
    assert AdapterModel.load(saved, backbone()).classes == [4, 2, 9, 1]
    assert not (saved / "stray").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["model"], "no scratch folder is left"


def test_place_that_cannot_be_written(saved: Path, model: AdapterModel) -> None:
    """A file stands where the parent folder should be: also for root, whom permissions do not stop."""
    blocker = saved.parent / "file"
    blocker.write_text("in the way")
    before = contents(saved.parent)
    for place in (blocker / "model", blocker / "deeper" / "model"):
        with pytest.raises(StorageError, match=r"cannot write to .*file"):
            model.save(place)
    with pytest.raises(StorageError, match="exists already"):
        model.save(blocker)
    assert contents(saved.parent) == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_in_the_middle_of_a_save(
    saved: Path, model: AdapterModel, monkeypatch: pytest.MonkeyPatch, error: BaseException, overwrite: bool
) -> None:
    """A full disk, Ctrl-C: the save before is untouched, and no half folder is left."""
    before = contents(saved.parent)
    written: list[str] = []

    def fails(folder: Path, name: str, tensors: Any, link_from: Path | None = None) -> str:
        if len(written) == 2:
            raise error
        written.append(name)
        return put_tensors(folder, name, tensors, link_from)

    monkeypatch.setattr(model_files, "put_tensors", fails)
    full = isinstance(error, OSError)
    with pytest.raises(StorageError if full else type(error), match="No space left" if full else ""):
        model.save(saved if overwrite else saved.parent / "new", overwrite=overwrite)
    assert len(written) == 2
    assert contents(saved.parent) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux")
def test_overwriting_swaps_both_folders_in_one_step(
    saved: Path, model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is there no saved model: the folder is never renamed away."""

    def never(self: Path, target: Path) -> Path:
        raise AssertionError(f"{self} renamed to {target}")

    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", never)
        model.save(saved, overwrite=True)
    (old,) = [path for path in saved.parent.iterdir() if path.name.startswith(f".{saved.name}.")]
    assert (old / "model.json").is_file()
    assert (saved / "model.json").is_file()


def test_failure_of_the_last_rename_puts_the_old_folder_back(
    saved: Path, model: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, calls = contents(saved.parent), Path.rename, []

    def fails_once(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)  # a system without renameat2
    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(StorageError, match=r"cannot write .*Input/output error"):
        model.save(saved, overwrite=True)
    assert contents(saved.parent) == before


def test_crash_leaves_the_old_save_readable(saved: Path, backbone: MakeBackbone, model: AdapterModel) -> None:
    """What a killed process leaves behind is a hidden scratch folder beside, never a half model in place."""
    scratch = new_folder(saved.parent / "other")
    folder = scratch.__enter__()
    put_tensors(folder, "heads.safetensors", {"a": torch.zeros(2)})
    assert not (saved.parent / "other").exists()
    assert folder.name.startswith(".other.")
    assert AdapterModel.load(saved, backbone()).classes == [4, 2, 9]
    scratch.__exit__(None, None, None)


def test_unchanged_files_are_linked_and_survive_their_origin(
    saved: Path, model: AdapterModel, backbone: MakeBackbone
) -> None:
    model.head.grow(1, torch.Generator())
    model.add_task([7])
    model.prototypes.append(torch.zeros(1, 16))
    model.statistics.add(torch.randn(3, 16))  # type: ignore[union-attr]
    later = model.save(saved.parent / "later", link_from=saved)

    def inode(folder: Path, name: str) -> int:
        return (folder / name).stat().st_ino

    for name in ("adapters/0000.safetensors", "adapters/0001.safetensors", "statistics/0000.safetensors"):
        assert inode(saved, name) == inode(later, name)
    assert inode(saved, "heads.safetensors") != inode(later, "heads.safetensors")
    shutil.rmtree(saved)
    assert AdapterModel.load(later, backbone()).classes == [4, 2, 9, 7]


def test_damaged_origin_is_not_linked(saved: Path, model: AdapterModel, backbone: MakeBackbone) -> None:
    path = saved / "adapters/0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    later = model.save(saved.parent / "later", link_from=saved)
    assert AdapterModel.load(later, backbone()).num_slots == 2
    assert model.save(saved.parent / "third", link_from=saved.parent / "nowhere").is_dir()


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    with new_folder(tmp_path / "x") as folder:
        digest = put_tensors(folder, "t.safetensors", {"a": base.T, "b": base.clone()[:, 1:3], "c": torch.empty(0, 4)})
    found: dict[str, Tensor] = get_tensors(tmp_path / "x" / "t.safetensors", digest)
    assert torch.equal(found["a"], base.T)
    assert torch.equal(found["b"], base[:, 1:3])
    assert found["c"].shape == (0, 4)
