"""What commands print: strict JSON, and nothing of users or files that steers the terminal or is taken for markup."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from cl_adapters.benchmarks.cli import _console, listing, root
from cl_adapters.benchmarks.cli import run as run_commands
from cl_adapters.benchmarks.cli.options import check_device
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.registry import Registry

HOSTILE = "[/x] [red]a\x1b[2J\x07\x9b \u202eb\n:cat: \\"
VISIBLE = "[/x] [red]a\\x1b[2J\\x07\\x9b \\u202eb\\n:cat: \\"


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict_and_faithful(capsys: pytest.CaptureFixture[str]) -> None:
    _console.print_json({"a": math.nan, "b": [math.inf, (1, -math.inf)], "c": HOSTILE, "d": 0.5})
    assert strict(capsys.readouterr().out) == {"a": None, "b": [None, [1, None]], "c": HOSTILE, "d": 0.5}


def test_only_one_place_writes_json_for_people_and_programs(repo_root: Path) -> None:
    files = (repo_root / "benchmarks" / "cli").glob("*.py")
    users = {path.name for path in files if "dumps(" in path.read_text(encoding="utf-8")}
    assert users == {"_console.py", "pool.py"}, "pool.py: values in a table"


def test_lines_and_errors_show_what_would_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    _console.say(HOSTILE)
    _console.print_error(HOSTILE)
    found = capfd.readouterr()
    assert found.err == f"error: {VISIBLE}\n"
    assert "\x1b[2J" not in found.out


def test_names_of_plugins_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("kind", "cl_adapters.codecs", group="nobody")
    registry._scanned = True
    registry.register(HOSTILE)(type("Plugin", (), {"summary": HOSTILE}))
    monkeypatch.setattr(listing, "_registry", lambda kind: registry)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["list", "codecs"])
    assert result.exit_code == 0, result.exception
    assert result.output.count(VISIBLE) == 2


def test_names_in_answers_and_results_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = SimpleNamespace(
        input=HOSTILE, name=HOSTILE, label=0, score=0.5, adapter=0, abstained=False, ranking=[(HOSTILE, 0.5)] * 2
    )
    model = SimpleNamespace(predict_files=lambda files: [answer])
    monkeypatch.setattr("cl_adapters.benchmarks.run.runner.latest_model", lambda *given: model)
    words = ["predict", "--run", str(tmp_path), "x.png"]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, words)
    assert result.exit_code == 0, result.exception
    assert result.output.count(VISIBLE) == 3
    assert strict(CliRunner().invoke(app, [*words, "--json"]).output)[0]["class"] == HOSTILE
    seconds = SimpleNamespace(train=0.0, statistics=0.0, alignment=0.0, eval=0.0)
    results: Any = SimpleNamespace(
        strategy="[/x]", benchmark="[/y]", seed=0, task_classes=[(0,)], seconds_per_task=[seconds], a_curve=[None],
        backbone_passes_per_image=SimpleNamespace(per_evaluation=[None]), forgetting=None, a_bar=None, a_last=None,
    )  # fmt: skip
    run_commands._finish(results, tmp_path)
    assert "A-bar - %" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["meta", "nonsense", "", "cuda:99", "xla", "mps:3", "hpu", "lazy"])
def test_devices_on_which_nothing_can_be_computed(device: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here"):
        check_device(device)
    check_device("cpu")


def test_errors_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
        monkeypatch.setattr(root, "app", fail)
        monkeypatch.setattr(root, "_silence_output", lambda: None)
        with pytest.raises(SystemExit) as ended:
            root.main()
    assert ended.value.code == 2
    assert capfd.readouterr().err == "error: Permission denied: somewhere\n"


RUN = ("run", "--strategy", "simple_cil", "--benchmark", "digits")


@pytest.mark.parametrize("out", ["x" * 300, "file/below", "/proc/x", "/sys/kernel/x"])
def test_places_that_cannot_be_written_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, quick_run: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result = CliRunner().invoke(app, [*RUN, "--out", out])
    assert isinstance(result.exception, ClAdaptersError), result.exception
    assert "cannot write" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that needs neither data nor backbone."""
    from cl_adapters.benchmarks.run import runner

    class Nothing:
        row_type = object
        tasks = ()
        description: ClassVar[dict[str, Any]] = {}

        def __init__(self, *given: Any) -> None:
            pass

        def restore(self, *given: Any) -> None:
            pass

    monkeypatch.setattr(runner, "_Runner", Nothing)


def command(*words: str, **more: Any) -> subprocess.Popen[str]:
    """A command in a process that hears Ctrl-C, which processes in the background of a shell ignore."""
    line = [sys.executable, "-m", "cl_adapters.benchmarks.cli", *words]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored stays so in children
    try:
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    finally:
        signal.signal(signal.SIGINT, before)


def test_output_to_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        line = [sys.executable, "-m", "cl_adapters.benchmarks.cli", "list", "codecs"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    out = tmp_path / "run"
    words = ("run", "--strategy", "sequential", "--benchmark", "digits", "--set", "train_epochs=100000", "--out")
    process = command(*words, str(out))
    deadline = time.monotonic() + 100
    while not (out / "config.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    try:
        said, errors = process.communicate(timeout=100)
    finally:
        process.kill()  # it would run for days
    assert process.returncode == code, errors
    assert said.splitlines()[-1] == f"interrupted; go on with: cl-adapters resume {out}"
    assert not errors


def test_ctrl_c_while_commands_are_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from cl_adapters.benchmarks import cli

    monkeypatch.setitem(sys.modules, "cl_adapters.benchmarks.cli.root", _Interrupting("root"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


class _Interrupting(type(sys)):  # type: ignore[misc]
    """A module whose import is interrupted by Ctrl-C."""

    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt
