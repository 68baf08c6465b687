"""Compares the files of a wheel with the tracked files of the package: each there once, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter

FOLDERS = {
    "cl_adapters/": "cl_adapters/",
    "benchmarks/": "cl_adapters/benchmarks/",
    "strategies/": "cl_adapters/strategies/",
}


def expected() -> set[str]:
    """Names in the wheel of every tracked file of the package; the symlinks have none."""
    listing = subprocess.run(["git", "ls-files", "-s"], check=True, capture_output=True, text=True).stdout
    names = set()
    for line in listing.splitlines():
        mode, path = line.split()[0], line.split("\t")[1]
        for folder, package in FOLDERS.items():
            if path.startswith(folder) and mode != "120000":
                names.add(package + path.removeprefix(folder))
    return names


def main(wheel: str) -> int:
    """Print what differs; return the exit status."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.compress_size for info in archive.infolist())
    files = {name for name in names if ".dist-info/" not in name}
    problems = {
        "twice in the wheel": {name for name, count in Counter(names).items() if count > 1},
        "missing from the wheel": expected() - files,
        "in the wheel but not tracked": files - expected(),
        "outside cl_adapters/": {name for name in files if not name.startswith("cl_adapters/")},
    }
    for problem, found in problems.items():
        for name in sorted(found):
            print(f"{problem}: {name}")
    print(f"{len(files)} files, {size / 1e6:.1f} MB; top level: {', '.join(sorted({n.split('/')[0] for n in names}))}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
