"""Benchmarks of own texts: every format, splits, limits, and what a bad file says."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cl_adapters.benchmarks.base import BenchmarkData, ImageSet, TextSet
from cl_adapters.benchmarks.data._text_files import read_rows
from cl_adapters.benchmarks.data.text import Text
from cl_adapters.benchmarks.run.experiment import data_fingerprint
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.errors import ConfigError, DataError, UnknownName

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


def test_labels_that_are_numbers_come_in_their_order_and_spaces_make_no_class(tmp_path: Path) -> None:
    table = [{"text": f"text {i} of {label}", "label": f"{label}{' ' * i}"} for i in range(3) for label in range(12)]
    path = write_csv(tmp_path / "a.csv", table)
    assert Text(file=str(path), tasks=2).load(0).classes == tuple(map(str, range(12)))
    table.append({"text": "a", "label": "x"})
    table.append({"text": "b", "label": "x"})
    classes = Text(file=str(write_csv(path, table)), tasks=2).load(0).classes
    assert classes[:3] == ("0", "1", "10"), "among names they are names"


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


def test_a_file_without_the_name_of_the_benchmark(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", rows())
    with pytest.raises(UnknownName, match=rf"is a file: for a table of texts write 'text:{path}'"):
        parse_benchmark(str(path), {})


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
