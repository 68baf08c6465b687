"""Benchmarks of texts: tables of own texts, CLINC150, Banking77, the hub; and what a bad file says."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_adapters.benchmarks.base import BenchmarkData, ImageSet, TextSet
from cl_adapters.benchmarks.data.banking77 import Banking77
from cl_adapters.benchmarks.data.clinc150 import Clinc150
from cl_adapters.benchmarks.data.huggingface import HuggingFace
from cl_adapters.benchmarks.data.text import Text
from cl_adapters.benchmarks.experiment import data_fingerprint
from cl_adapters.benchmarks.text_files import read_rows
from cl_adapters.errors import ConfigError, DataError

CLASSES = ("card payment", "late_card", "über")


def rows(per_class: int = 10) -> list[dict[str, str]]:
    return [{"text": f'{name}, query "{i}"\nplease', "label": name} for name in CLASSES for i in range(per_class)]


def write_csv(path: Path, table: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def write_tsv(path: Path, table: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(table)
    return path


def write_jsonl(path: Path, table: list[dict[str, str]]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in table), encoding="utf-8")
    return path


def write_parquet(path: Path, table: list[dict[str, str]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], Path]] = {
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def test_every_format_gives_the_same_benchmark(tmp_path: Path) -> None:
    reference = Text(file=str(write_csv(tmp_path / "a.csv", rows())), tasks=3).load(0)
    assert reference.modality == "text"
    assert reference.classes == CLASSES
    assert (len(reference.train), len(reference.test)) == (24, 6)
    for suffix, write in WRITERS.items():
        data = Text(file=str(write(tmp_path / f"b{suffix}", rows())), tasks=3).load(0)
        assert data_fingerprint(data) == data_fingerprint(reference), suffix


def test_texts_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    data = Text(file=str(write_csv(tmp_path / "a.csv", rows())), tasks=1).load(0)
    assert isinstance(data.train, TextSet)
    assert isinstance(data.test, TextSet)
    found = {
        (text, data.classes[label])
        for part in (data.train, data.test)
        for text, label in zip(part.texts, part.labels, strict=True)
    }
    assert found == {(row["text"], row["label"]) for row in rows()}
    assert data.train.labels.dtype == np.int64


def test_names_say_file_and_line_also_after_texts_of_several_lines(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", rows(2))
    read = read_rows(path, "text", "label")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [row.place for row in read[:3]] == ["a.csv:2", "a.csv:4", "a.csv:6"]
    assert "card payment" in lines[1]


def test_held_out_share_follows_no_seed_and_keeps_equal_texts_together(tmp_path: Path) -> None:
    table = rows(5) * 3
    data = Text(file=str(write_csv(tmp_path / "a.csv", table)), tasks=1, test_share=0.4).load(0)
    again = Text(file=str(tmp_path / "a.csv"), tasks=1, test_share=0.4).load(7)
    assert isinstance(data.train, TextSet) and isinstance(data.test, TextSet) and isinstance(again.test, TextSet)
    assert set(data.test.texts) == set(again.test.texts)
    assert not set(data.train.texts) & set(data.test.texts)
    assert np.bincount(data.test.labels).tolist() == [6, 6, 6], "2 of 5 different texts, each 3 times"


def test_a_new_class_moves_no_text_of_another(tmp_path: Path) -> None:
    few = Text(file=str(write_csv(tmp_path / "a.csv", rows()[:20])), tasks=1).load(0)
    all_ = Text(file=str(write_csv(tmp_path / "b.csv", rows())), tasks=1).load(0)
    assert isinstance(few.test, TextSet) and isinstance(all_.test, TextSet)
    assert set(few.test.texts) < set(all_.test.texts)


def test_split_column(tmp_path: Path) -> None:
    parts = ["train", "train", "Test", "validation", "train"]
    table = [row | {"split": parts[i % 5]} for i, row in enumerate(rows())]
    data = Text(file=str(write_csv(tmp_path / "a.csv", table)), tasks=1).load(0)
    assert (len(data.train), len(data.test)) == (18, 6), "validation is left out"
    table = [row | {"split": "train" if i % 5 else "dev"} for i, row in enumerate(rows())]
    data = Text(file=str(write_csv(tmp_path / "b.csv", table)), tasks=1).load(0)
    assert (len(data.train), len(data.test)) == (24, 6), "no test rows: validation is the test set"
    table[4]["split"] = "tarin"
    with pytest.raises(DataError, match=r"c\.csv:10 has split 'tarin'; expected train, test"):
        Text(file=str(write_csv(tmp_path / "c.csv", table)), tasks=1).load(0)


def test_test_file_other_columns_and_limits(tmp_path: Path) -> None:
    renamed = [{"query": row["text"], "intent": row["label"]} for row in rows()]
    config = Text(
        file=str(write_csv(tmp_path / "a.csv", renamed)),
        test=str(write_jsonl(tmp_path / "b.jsonl", renamed[::2])),
        text_column="query",
        label_column="intent",
        train_per_class=4,
        test_per_class=3,
        tasks=2,
    )
    data = config.load(0)
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(data.test.labels).tolist() == [3, 3, 3]
    assert isinstance(data.train, TextSet)
    assert data.train.texts[0] == renamed[0]["query"], "the first ones of the file"


def test_class_order(tmp_path: Path) -> None:
    path = str(write_csv(tmp_path / "a.csv", rows()))
    assert Text(file=path, tasks=3, shuffle=False).load(5).class_order == (0, 1, 2)
    orders = {Text(file=path, tasks=3).load(seed).class_order for seed in range(6)}
    assert len(orders) > 1
    fixed = Text(file=path, tasks=3, order_seed=1993)
    assert fixed.load(0).class_order == fixed.load(1).class_order
    with pytest.raises(ConfigError, match="order_seed=1 is of no use"):
        Text(file=path, shuffle=False, order_seed=1)


BAD: dict[str, tuple[str, str]] = {
    "missing column": ("a.csv", "text,intent\nhello,greet\n"),
    "fields": ("a.csv", "text,label\nhello,greet\nhow, are you,greet\n"),
    "empty text": ("a.csv", "text,label\nhello,greet\n  ,greet\n"),
    "empty label": ("a.csv", "text,label\nhello,greet\nbye,\n"),
    "quote": ("a.csv", 'text,label\nhello,greet\n"by"e,leave\n'),
    "no rows": ("a.csv", "text,label\n"),
    "nothing": ("a.csv", ""),
    "twice": ("a.csv", "text,text\na,b\n"),
    "json": ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": \n'),
    "no object": ("a.jsonl", "[1, 2]\n"),
    "number": ("a.jsonl", '{"text": 3, "label": "b"}\n'),
    "list label": ("a.jsonl", '{"text": "a", "label": ["b"]}\n'),
    "float label": ("a.jsonl", '{"text": "a", "label": 1.5}\n'),
    "parquet": ("a.parquet", "text,label\n"),
    "suffix": ("a.xlsx", "text"),
}
MESSAGES = {
    "missing column": r"a\.csv, line 2: no column 'label'; it has 'text', 'intent'",
    "fields": r"a\.csv, line 3: 3 fields, but the header has 2",
    "empty text": r"a\.csv, line 3: 'text' is empty",
    "empty label": r"a\.csv, line 3: 'label' must be a class name",
    "quote": r"a\.csv, line 3: ",
    "no rows": r"a\.csv has no rows",
    "nothing": r"a\.csv has no rows",
    "twice": r"a\.csv, line 1: two columns have the same name",
    "json": r"a\.jsonl, line 2: not JSON",
    "no object": r"a\.jsonl, line 1: expected an object",
    "number": r"a\.jsonl, line 1: 'text' is no text but 3",
    "list label": r"a\.jsonl, line 1: 'label' must be",
    "float label": r"a\.jsonl, line 1: 'label' must be",
    "parquet": r"a\.parquet: no parquet file",
    "suffix": r"a\.xlsx: cannot tell the format from '\.xlsx'",
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_file_is_one_error_that_names_the_line(case: str, tmp_path: Path) -> None:
    if case == "parquet":
        pytest.importorskip("pyarrow")
    name, content = BAD[case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=MESSAGES[case]):
        Text(file=str(tmp_path / name)).load(0)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Text(file=str(tmp_path / "none.csv")).load(0)
    with pytest.raises(DataError, match="is a folder"):
        Text(file=str(tmp_path)).load(0)
    (tmp_path / "latin.csv").write_bytes("text,label\nüber,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        Text(file=str(tmp_path / "latin.csv")).load(0)


def test_classes_that_cannot_be_split(tmp_path: Path) -> None:
    table = [*rows(), {"text": "only one", "label": "lonely"}, {"text": "only one", "label": "lonely"}]
    path = write_csv(tmp_path / "a.csv", table)
    with pytest.raises(DataError, match="class 'lonely' has a single text"):
        Text(file=str(path)).load(0)
    other = write_csv(tmp_path / "b.csv", rows())
    with pytest.raises(DataError, match="classes with train texts but no test texts: 'lonely'"):
        Text(file=str(path), test=str(other)).load(0)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="pip install pyarrow"):
        Text(file=str(tmp_path / "a.parquet")).load(0)


def test_the_fingerprint_sees_every_letter(tmp_path: Path) -> None:
    def data(texts: list[str]) -> BenchmarkData:
        part = TextSet(texts, np.array([0, 1]))
        return BenchmarkData(
            name="x", classes=("a", "b"), class_order=(0, 1), task_sizes=(2,), licence="none", train=part, test=part
        )

    prints = {data_fingerprint(data(texts)) for texts in (["ab", "c"], ["a", "bc"], ["ab", "C"], ["ab", "c"])}
    assert len(prints) == 3


def test_images_and_texts_do_not_mix() -> None:
    texts, images = TextSet(["a"], np.array([0])), ImageSet(np.zeros((1, 2, 2, 3), np.uint8), np.array([0]))
    with pytest.raises(DataError, match="images to train on, but texts to test"):
        BenchmarkData(
            name="x", classes=("a",), class_order=(0,), task_sizes=(1,), licence="none", train=images, test=texts
        )


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
