"""CLINC150 and Banking77 from the files of their authors, and data sets of the hub (its library played)."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cl_adapters.benchmarks.base import TextSet
from cl_adapters.benchmarks.data.banking77 import Banking77
from cl_adapters.benchmarks.data.clinc150 import Clinc150
from cl_adapters.benchmarks.data.huggingface import HuggingFace
from cl_adapters.errors import ConfigError, DataError


@pytest.mark.assets
def test_clinc150(assets: Path) -> None:
    config = Clinc150(folder=str(assets / "text" / "clinc150"))
    data = config.load(0)
    assert (len(data.train), len(data.test), len(data.classes)) == (15_000, 4_500, 150)
    assert data.task_sizes == (10,) * 15
    assert "translate" in data.classes
    assert [len(config.out_of_scope(split)) for split in ("train", "val", "test")] == [100, 100, 1_000]
    limited = Clinc150(folder=config.folder, train_per_class=20, test_per_class=10).load(0)
    assert (len(limited.train), len(limited.test)) == (3_000, 1_500)


@pytest.mark.assets
def test_clinc150_by_domain(assets: Path) -> None:
    config = Clinc150(folder=str(assets / "text" / "clinc150"), split="domains")
    domains = {
        frozenset(intents) for intents in json.loads((Path(config.folder) / "domains.json").read_text()).values()
    }
    data = config.load(0)
    assert {frozenset(data.classes[label] for label in task) for task in data.tasks} == domains
    assert config.load(1).tasks != data.tasks
    pairs = Clinc150(folder=config.folder, split="domains", tasks=5).load(0)
    assert pairs.task_sizes == (30,) * 5
    assert pairs.class_order == data.class_order
    with pytest.raises(ConfigError, match="tasks must be between 1 and"):
        Clinc150(folder=config.folder, split="domains", tasks=11).load(0)


@pytest.mark.assets
def test_banking77(assets: Path) -> None:
    data = Banking77(folder=str(assets / "text" / "banking77")).load(0)
    assert (len(data.train), len(data.test), len(data.classes)) == (10_003, 3_080, 77)
    assert data.task_sizes == (11,) * 7


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_full\.json cannot be read.*clinc/oos-eval"):
        Clinc150(folder=str(tmp_path)).load(0)
    (tmp_path / "data_full.json").write_text(json.dumps({"train": [["a", "b"]]}))
    with pytest.raises(DataError, match="15,000 queries are expected in 'train', found 1 queries"):
        Clinc150(folder=str(tmp_path)).load(0)
    (tmp_path / "train.csv").write_text("text,category\na,b\n")
    with pytest.raises(DataError, match="10,003 queries are expected, found 1"):
        Banking77(folder=str(tmp_path)).load(0)


class Table(dict[str, list[Any]]):
    """What the library ``datasets`` gives, as far as it is used."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None) -> None:
        super().__init__(columns)
        self.column_names = list(columns)
        self.features = {name: types.SimpleNamespace(names=names if name == "label" else None) for name in columns}
        self.info = types.SimpleNamespace(license="cc-by-4.0")


def fake_library(monkeypatch: pytest.MonkeyPatch, names: list[str] | None = None) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Table:
        asked.append((name, config, split, revision))
        if name == "gone":
            raise ConnectionError("Couldn't reach the Hugging Face Hub\nand more")
        return Table({"text": [f"{split} {i}" for i in range(6)], "label": [0, 1] * 3}, names)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_library(monkeypatch, ["no card", "late"])
    data = HuggingFace(dataset="some/intents", config="en", revision="abc", tasks=2).load(0)
    assert asked == [("some/intents", "en", "train", "abc"), ("some/intents", "en", "test", "abc")]
    assert data.classes == ("late", "no card")
    assert isinstance(data.test, TextSet)
    assert data.test.texts[0] == "test 0"
    assert data.classes[data.test.labels[0]] == "no card"
    assert "cc-by-4.0" in data.licence
    held = HuggingFace(dataset="some/intents", test_split=None, test_share=0.34, tasks=2).load(0)
    assert (len(held.train), len(held.test)) == (4, 2)


def test_hub_without_network_library_or_column(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(monkeypatch)
    with pytest.raises(
        DataError, match=r"'gone', split 'train', cannot be had here: Couldn't reach the Hugging Face Hub\."
    ):
        HuggingFace(dataset="gone").load(0)
    with pytest.raises(DataError, match="no column 'query'; it has text, label"):
        HuggingFace(dataset="some/intents", text_column="query").load(0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        HuggingFace(dataset="some/intents").load(0)
