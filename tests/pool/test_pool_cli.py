"""`cl-adapters pool ...`: what it prints, what it changes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.errors import PoolError, UnknownName
from cl_adapters.pool import AdapterPool


def call(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["pool", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_ls_and_show(pool: AdapterPool) -> None:
    text = call("ls", pool.path)
    for part in ("task-000", "task-001", "bottleneck", "class 2, 3", "even", "2 of 2 adapters of backbone seed-0"):
        assert part in text
    rows = json.loads(call("ls", pool.path, "--tag", "even", "--label", "1", "--type", "bottleneck", "--json"))
    assert [row["id"] for row in rows] == ["task-000"]
    assert json.loads(call("ls", pool.path, "--label", "9", "--json")) == []
    plain = json.loads(call("show", pool.path, "task-001", "--json"))
    assert plain["metrics"] == {"accuracy": 91.5}
    text = call("show", pool.path, "task-001")
    assert plain["adapter_sha"][:20] in text
    assert "digits" in text
    with pytest.raises(UnknownName, match=r"did you mean 'task-001'\?"):
        call("show", pool.path, "task-00")


def test_changes(pool: AdapterPool, backbone: FrozenBackbone, tmp_path: Path) -> None:
    assert "task-000: even, new" in call("tag", pool.path, "task-000", "--add", "new")
    assert "task-000: no tags" in call("tag", pool.path, "task-000", "--remove", "new", "--remove", "even")
    call("rename", pool.path, "task-000", "first")
    assert list(pool.ids) == ["first", "task-001"]
    assert "wrote" in call("export", pool.path, "first", tmp_path / "one")
    assert "added again: class 0, 1" in call("import", pool.path, tmp_path / "one", "--id", "again")
    other = AdapterPool.create(tmp_path / "other", backbone)
    assert "copied 1: again" in call("copy", pool.path, other.path, "again")
    assert "copied 2: first, task-001" in call("copy", pool.path, other.path)
    assert "copied 0" in call("copy", pool.path, other.path)
    call("rm", pool.path, "first", "again")
    assert list(pool.ids) == ["task-001"]
    assert len(other) == 3
    with pytest.raises(PoolError, match="does not exist"):
        call("ls", tmp_path / "nowhere")


def test_rm_takes_all_or_none(pool: AdapterPool) -> None:
    assert "did you mean 'task-001'" in str(
        CliRunner().invoke(app, ["pool", "rm", str(pool.path), "task-000", "task-01"]).exception
    )
    assert pool.ids == ("task-000", "task-001")
    call("rm", pool.path, "task-000", "task-000")
    assert [*pool.ids] == ["task-001"]


def test_verify_gc_and_broken_records(pool: AdapterPool) -> None:
    assert "0 problems, 0 orphans" in call("verify", pool.path)
    (pool.path / "adapters" / "left").write_bytes(b"")
    assert "orphan: adapters/left" in call("verify", pool.path)
    assert "deleted adapters/left" in call("gc", pool.path)
    (pool.path / pool.get("task-000").files[0]).write_bytes(b"x")
    text = call("verify", pool.path, code=1)
    assert "wrong: task-000: " in text
    assert "1 problems, 0 orphans" in text
    assert json.loads(call("verify", pool.path, "--json", code=1))["ok"] is False
    path = pool.path / "manifest.json"
    path.write_text(path.read_text().replace('"task-000"', '"../../[red]x"'))
    assert "broken: ../../[red]x: record: '../../[red]x' cannot be an adapter's id" in call("ls", pool.path)
    call("rm", pool.path, "../../[red]x")
    assert "0 problems, 0 orphans" in call("verify", pool.path)
    assert pool.ids == ("task-001",)


def test_an_error_is_one_line_and_listing_loads_no_torch(pool: AdapterPool, repo_root: Path) -> None:
    code = (
        "import sys; from cl_adapters.benchmarks.cli.root import app, main; "
        f"app(['pool', 'ls', {str(pool.path)!r}], standalone_mode=False); assert 'torch' not in sys.modules; "
        f"sys.argv = ['cl-adapters', 'pool', 'show', {str(pool.path)!r}, 'no-such']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "2 of 2 adapters" in done.stdout
    assert done.stderr.startswith("error: unknown adapter 'no-such'")
    assert done.stderr.count("\n") == 1
