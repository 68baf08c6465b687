"""``NAME`` and ``NAME:ARGUMENT`` as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_adapters.benchmarks.data.digits import Digits
from cl_adapters.benchmarks.data.folder import Folder
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.errors import ConfigError, UnknownName


def test_plain_name() -> None:
    assert parse_benchmark("digits", {"tasks": 2}) == ("digits", Digits(tasks=2))


def test_argument_and_options() -> None:
    expected = ("folder", Folder(path="/a:b/c d", tasks=3))
    assert parse_benchmark("folder:/a:b/c d", {"tasks": 3}) == expected
    assert parse_benchmark("folder", {"path": "/a:b/c d", "tasks": 3}) == expected


def test_options_are_not_changed() -> None:
    options = {"tasks": 3}
    parse_benchmark("folder:x", options)
    assert options == {"tasks": 3}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("digits:3", {}, "benchmark 'digits' takes no argument, got 'digits:3'"),
        ("digits:", {}, "benchmark 'digits' takes no argument"),
        ("folder", {}, "benchmark 'folder' needs its path; write folder:PATH"),
        ("folder:", {}, "'folder:' has nothing after the colon; write folder:PATH"),
        ("folder:a", {"path": "b"}, "path is given twice: 'a' and 'b'"),
        ("digits", {"taks": 3}, "unknown option benchmark.taks; did you mean 'tasks'"),
        ("digits", {"tasks": "x"}, "benchmark.tasks: .*valid integer"),
        ("digits", {"augmentation": {"kind": "blur"}}, "benchmark.augmentation: .*not 'blur'"),
    ],
)
def test_refusals(text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_benchmark(text, options)


def test_unknown_benchmark() -> None:
    with pytest.raises(UnknownName, match=r"unknown benchmark 'digts'; did you mean 'digits'\? Known: .*folder"):
        parse_benchmark("digts", {})


def test_a_bare_folder_gets_the_hint(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=f"to use your own images write 'folder:{tmp_path}'"):
        parse_benchmark(str(tmp_path), {})


def test_an_argument_with_a_default_may_be_left_out() -> None:
    name, config = parse_benchmark("glyphs", {"tasks": 2})
    assert (name, config.classes) == ("glyphs", 100)  # type: ignore[attr-defined]
    assert parse_benchmark("glyphs:20", {"tasks": 2})[1].classes == 20  # type: ignore[attr-defined]
