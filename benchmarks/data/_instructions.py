"""Tasks of prompts and answers: from a folder of JSON lines, or made of a benchmark of labelled texts.

FOLDER/TASK.train.jsonl     one object per line: "prompt", "answer" and, where there are label strings, "choices"
FOLDER/TASK.test.jsonl
FOLDER/order.txt            names of the tasks, one per line; without it they come in the order of their names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_adapters.benchmarks.base import BenchmarkData, TextSet
from cl_adapters.benchmarks.data._text_files import READERS, readable
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.errors import DataError, UnknownName
from cl_adapters.strategies.instruct.tasks import Example, InstructTask

ORDER = "order.txt"
TEMPLATE = "Text: {text}\nLabel:"
"""Prompt of a labelled text."""


def read_tasks(
    spec: str, order: Sequence[str] | None = None, options: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[InstructTask, ...]:
    """Read the tasks that a user names.

    Args:
        spec: "instruct:FOLDER" or a folder of JSON lines; or a benchmark of texts such as "text:FILE", of which each
            task becomes one of prompts.
        order: names of the tasks in their order, all or some of them; default that of the folder, or of the benchmark.
        options: of the benchmark; of none for a folder.
        seed: of the benchmark's class order.

    Raises:
        DataError: no tasks, or data that cannot be used: names file and line.
        UnknownName: a task in ``order`` that is not there, or no such benchmark.
    """
    prefix, _, place = spec.partition(":")
    folder = Path(place if prefix == "instruct" and place else spec).expanduser()
    if prefix == "instruct" or folder.is_dir():
        if options:
            raise DataError(f"{folder} is a folder of tasks and has no options; got {', '.join(options)}")
        return in_order(read_folder(folder), order, str(folder))
    try:
        _, config = parse_benchmark(spec, options or {})
    except UnknownName as error:
        raise UnknownName(f"there is no folder {spec!r} to take tasks from; {error}") from None
    return in_order(from_benchmark(config.load(seed)), order, spec)


def read_folder(folder: Path) -> tuple[InstructTask, ...]:
    """The tasks of a folder, in the order of its ``order.txt``, else of their names.

    Raises:
        DataError: no folder, no tasks, one split of a task only, or a line that cannot be used: names it; an
            ``order.txt`` that is empty or not UTF-8.
        UnknownName: ``order.txt`` names a task that is not there.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: expected one with TASK.train.jsonl and TASK.test.jsonl for each task")
    names = {
        split: {path.name.removesuffix(f".{split}.jsonl") for path in folder.glob(f"*.{split}.jsonl")}
        for split in ("train", "test")
    }
    if not names["train"] | names["test"]:
        raise DataError(f"{folder} has no tasks: expected TASK.train.jsonl and TASK.test.jsonl for each task")
    lonely = sorted(names["train"] ^ names["test"])
    if lonely:
        has = "train" if lonely[0] in names["train"] else "test"
        raise DataError(f"{folder}: task {lonely[0]!r} has a {has} file only; every task needs both")
    tasks = tuple(
        InstructTask(
            name=name,
            train=_examples(folder / f"{name}.train.jsonl"),
            test=_examples(folder / f"{name}.test.jsonl"),
        )
        for name in sorted(names["train"])
    )
    listed = folder / ORDER
    if not listed.is_file():
        return tasks
    try:
        order = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{listed} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not order:
        raise DataError(f"{listed} names no task: write one name per line, or remove the file")
    return in_order(tasks, order, str(listed))


def in_order(tasks: Sequence[InstructTask], order: Sequence[str] | None, where: str) -> tuple[InstructTask, ...]:
    """The named tasks in that order; None: all as they are.

    Raises:
        UnknownName: a name that no task has.
        DataError: a name twice.
    """
    if order is None:
        return tuple(tasks)
    by_name = {task.name: task for task in tasks}
    for name in order:
        if name not in by_name:
            raise UnknownName(f"{where}: {UnknownName.of('task', name, by_name)}")
    if len(set(order)) < len(order):
        raise DataError(f"{where}: a task is named twice in the order {', '.join(order)}")
    return tuple(by_name[name] for name in order)


def from_benchmark(data: BenchmarkData) -> tuple[InstructTask, ...]:
    """Each task of a benchmark of texts as one of prompts, with its class names as label strings.

    An answer begins with a space, as tokenizers of bytes want it.

    Raises:
        DataError: the benchmark has images.
    """
    if not isinstance(data.train, TextSet) or not isinstance(data.test, TextSet):
        raise DataError(f"benchmark {data.name!r} has images; instruction tuning needs texts, such as text:FILE")
    width = len(str(max(len(data.tasks) - 1, 0)))
    return tuple(
        InstructTask(
            name=f"{data.name}-{task:0{width}d}",
            train=_labelled(data, data.train, labels),
            test=_labelled(data, data.test, labels),
        )
        for task, labels in enumerate(data.tasks)
    )


def tasks_fingerprint(tasks: Sequence[InstructTask]) -> str:
    """SHA-256 over the names and all examples, in order."""
    digest = hashlib.sha256()
    for task in tasks:
        for split, examples in (("train", task.train), ("test", task.test)):
            for example in examples:
                row = [task.name, split, example.prompt, example.answer, *example.choices]
                digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _labelled(data: BenchmarkData, part: TextSet, labels: Sequence[int]) -> tuple[Example, ...]:
    choices = tuple(f" {data.classes[label]}" for label in labels)
    wanted = set(labels)
    return tuple(
        Example(prompt=TEMPLATE.replace("{text}", text), answer=f" {data.classes[label]}", choices=choices)
        for text, label in zip(part.texts, part.labels.tolist(), strict=True)
        if label in wanted
    )


def _examples(path: Path) -> tuple[Example, ...]:
    with readable(path):
        found = tuple(_example(path, line, values) for line, values in READERS[".jsonl"](path))
    if not found:
        raise DataError(f"{path} has no examples")
    return found


def _example(path: Path, line: int, values: Mapping[str, Any]) -> Example:
    unknown = sorted(set(values) - {"prompt", "answer", "choices"})
    if unknown:
        raise DataError(f"{path}, line {line}: unknown key {unknown[0]!r}; known: prompt, answer, choices")
    for key in ("prompt", "answer"):
        if not isinstance(values.get(key), str):
            raise DataError(f"{path}, line {line}: {key!r} must be a text, got {values.get(key)!r}")
    choices = values.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{path}, line {line}: 'choices' must be a list of texts, got {choices!r}")
    try:
        return Example(prompt=values["prompt"], answer=values["answer"], choices=tuple(choices))
    except DataError as error:
        raise DataError(f"{path}, line {line}: {error}") from error
