"""Verification: does every record have its files, unaltered, and of the right shapes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters._forms import shown
from cl_adapters._io import parse_json
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.pool.blobs import orphans, read_file
from cl_adapters.pool.manifest import Manifest
from cl_adapters.pool.model_card import read_card
from cl_adapters.pool.store import load_adapter, load_knowledge

if TYPE_CHECKING:
    from cl_adapters.backbones.frozen import FrozenBackbone


@dataclass(frozen=True)
class Verification:
    """What :meth:`AdapterPool.verify` found.

    Attributes:
        ok: nothing is wrong; orphans are allowed.
        problems: one line for each thing that is wrong, naming adapter and file.
        orphans: files that no record names, left by a writer that was killed; ``gc`` removes them.
    """

    ok: bool
    problems: tuple[str, ...]
    orphans: tuple[str, ...]


def verify_files(pool: Path, manifest: Manifest, backbone: FrozenBackbone | None) -> Verification:
    """Check every record and file of a pool against one state of its manifest.

    With a backbone tensors are checked against its sites.
    """
    problems = [f"{entry.id}: its record is broken: {entry.reason}" for entry in manifest.broken]
    problems += [f"the predictor: {problem}" for problem in _failures(partial(read_card, pool))]
    for record in manifest.records:
        for load in (
            partial(load_adapter, pool, record, backbone),
            partial(load_knowledge, pool, manifest.backbone, record),
        ):
            problems += [f"{record.id}: {problem}" for problem in _failures(load)]
    problems += _index_problems(pool, manifest)
    return Verification(not problems, tuple(problems), orphans(pool, manifest.files))


def _index_problems(pool: Path, manifest: Manifest) -> Iterator[str]:
    """Indexes in the pool's folder that hold keys which it does not have, such as those of a forgotten adapter."""
    from cl_adapters.index.files import index_folders
    from cl_adapters.index.keys import digest

    now = {record.id: digest(record) for record in manifest.records}
    for place in index_folders(pool):
        try:
            then = dict(parse_json(read_file(pool, f"index/{place.name}/index.json"))["digests"])
        except (PoolError, ValueError, TypeError, KeyError) as error:
            if (place / "index.json").exists():  # else it was deleted meanwhile
                yield f"index {place.name!r} cannot be read ({error}): build it again, or delete {place}"
            continue
        gone = [id for id, was in then.items() if now.get(id) != was]
        if gone:
            yield (
                f"index {place.name!r} holds keys that the pool does not have, of {shown(gone[0])}"
                f"{f' and {len(gone) - 1} more' if gone[1:] else ''}: build it again, or delete {place}"
            )


def _failures(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ClAdaptersError as error:
        yield str(error)
