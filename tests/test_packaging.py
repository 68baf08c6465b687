"""What pyproject.toml says, against the files and imports that are there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = {"cl_adapters": "cl_adapters", "benchmarks": "cl_adapters.benchmarks", "strategies": "cl_adapters.strategies"}
# Import names that differ from the distribution's name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "avalanche": "avalanche-lib",
    "faiss": "faiss-cpu",
    "fontTools": "fonttools",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


def sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Every Python file of the product with the import name of its package."""
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).parent.parts
            if folder == "cl_adapters" and inner[:1] in (("benchmarks",), ("strategies",)):
                continue  # the symlinks
            yield path, ".".join((package, *inner))


def test_package_list_is_what_is_on_disk(repo_root: Path, project: dict[str, Any]) -> None:
    on_disk = {package for _, package in sources(repo_root)}
    assert sorted(on_disk) == sorted(project["tool"]["setuptools"]["packages"])


def test_every_package_folder_has_an_init(repo_root: Path) -> None:
    missing = {path.parent for path, _ in sources(repo_root) if not (path.parent / "__init__.py").is_file()}
    assert not missing


def test_links_point_at_the_real_folders(repo_root: Path) -> None:
    for name in ("benchmarks", "strategies"):
        link = repo_root / "cl_adapters" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_every_import_is_a_declared_dependency(repo_root: Path, project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(text).name) for text in (*project["project"]["dependencies"], *extras["text"])
    }
    unknown = {}
    for path, _ in sources(repo_root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"cl_adapters"}:
                if canonicalize_name(DISTRIBUTIONS.get(top, top)) not in declared:
                    unknown[top] = str(path.relative_to(repo_root))
    assert not unknown, f"imported but not in pyproject.toml: {unknown}"


def test_lock_satisfies_the_ranges_and_names_no_place(repo_root: Path, project: dict[str, Any]) -> None:
    lines = (repo_root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    assert not [line for line in lines if re.search(r"://|file:|^-| @ ", line)]
    wanted = [
        *project["project"]["dependencies"],
        *(text for extra in project["project"]["optional-dependencies"].values() for text in extra),
    ]
    for minor in range(10, 15):
        version = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9", "sys_platform": "linux"}
        locked = {
            canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(version)
        }
        for text in wanted:
            requirement = Requirement(text)
            pinned = locked.get(canonicalize_name(requirement.name))
            assert pinned, f"Python 3.{minor}: {text} has no pin"
            assert requirement.specifier.contains(pinned), f"Python 3.{minor}: {pinned} is outside {text}"
