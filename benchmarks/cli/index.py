"""The `cl-adapters index` commands: make the index of a pool, ask it, describe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, print_json, say, shown
from cl_adapters.benchmarks.cli.options import Json, Pool, TextFile, Texts, Weights, given_texts, parse_settings
from cl_adapters.benchmarks.cli.pool import opened
from cl_adapters.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.index.answers import Hit
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.pool import AdapterPool

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
BATCH = 64
ANEW = ", calibrated on other keys: calibrate it again (cl-adapters index build --false-reject 0.05)"
"""What is said of the threshold of an index that has changed since."""

Name = Annotated[str, typer.Option(help="Which of the pool's indexes: its folder below index/.")]
Stale = Annotated[str, typer.Option(help="If the pool has changed since: error, warn, refresh or ignore.")]


def build_command(
    pool: Pool,
    keys: Annotated[
        str, typer.Option(help="What stands for a class: prototypes, centroids or features.")
    ] = "prototypes",
    per_class: Annotated[int | None, typer.Option(help="Keys per class at most; default 1, 4, all.", min=1)] = None,
    metric: Annotated[str, typer.Option(help="cosine, ip, l2 or mahalanobis.")] = "cosine",
    backend: Annotated[str, typer.Option(help="auto, or one of `cl-adapters list indexes`.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the back-end: probes=8, links=16, ..."),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    false_reject: Annotated[
        float | None, typer.Option(help="Calibrate 'none of these' to refuse at most this share of known inputs.")
    ] = None,
    false_accept: Annotated[
        float | None, typer.Option(help="Or to accept at most this share of unknown ones; an estimate.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of k-means, samples and training.", min=0)] = 0,
    name: Name = "default",
    as_json: Json = False,
) -> None:
    """Make the index of a pool and save it there; an index of that name is replaced."""
    from cl_adapters.index.calibration import calibrate
    from cl_adapters.index.files import default_folder
    from cl_adapters.index.index import AdapterIndex

    store = opened(pool)
    chosen: dict[str, Any] = {"keys": keys, "metric": metric}  # checked by the index
    index = AdapterIndex.build(
        store,
        **chosen,
        per_class=per_class,
        backend=backend,
        options=parse_settings(settings or ()),
        tags=tag or (),
        seed=seed,
    )
    if false_reject is not None or false_accept is not None:
        calibrate(index, false_reject, false_accept=false_accept)
    folder = index.save(default_folder(store, _checked(name)))
    _describe(index, folder, as_json)


def query_command(
    pool: Pool,
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Image files, folders of them, or .npy files of features [N, D].")
    ] = None,
    text: Texts = None,
    text_file: TextFile = None,
    k: Annotated[int, typer.Option(help="Nearest classes per input.", min=1)] = 5,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Lowest score that counts; default the calibrated one.")
    ] = None,
    weights: Weights = None,
    stale: Stale = "error",
    name: Name = "default",
    as_json: Json = False,
) -> None:
    """Show the nearest classes and adapters of images, texts or features."""
    texts = given_texts(text, text_file)
    if bool(inputs) == bool(texts):
        raise ConfigError("give image files or .npy files of features, or --text TEXT" + (", not both" * bool(texts)))
    store = opened(pool, weights)
    index = opened_index(store, name, stale)
    names, features = (texts, _encoded(store.backbone, texts)) if texts else _features(store, inputs or [])
    threshold = index.threshold if threshold is None else threshold
    places = min(k, max(1, len(index)))  # so that a large k asks for no more memory than there are keys
    answers = index.hits(index.search_features(features, places, classes=True, tags=tag or ()))
    known = [_is_known(hits, threshold) for hits in answers]
    if as_json:
        rows = [
            {"input": input_, "known": ok, "hits": [dataclasses.asdict(hit) for hit in hits]}
            for input_, ok, hits in zip(names, known, answers, strict=True)
        ]
        print_json({"threshold": threshold, "answers": rows})
        return
    table = Table("input", "class", "adapter", "score", "" if threshold is None else "answer")
    for input_, ok, hits in zip(names, known, answers, strict=True):
        answer = "" if ok is None else _class_of(hits[0]) if ok else "none of these"
        for place, hit in enumerate(hits):
            first = (input_, answer) if place == 0 else ("", "")
            table.add_row(*map(shown, (first[0], _class_of(hit), hit.record, f"{hit.score:.4f}", first[1])))
        if not hits:
            table.add_row(shown(input_), "-", "-", "-", answer)
    console.print(table)
    if threshold is not None:
        refused = sum(ok is False for ok in known)
        say(f"threshold {threshold:.4f}: {refused} of {len(known)} are none of these", wrapped=True)


def stats_command(pool: Pool, name: Name = "default", as_json: Json = False) -> None:
    """Describe an index: sizes, choices, and whether the pool has changed since."""
    from cl_adapters.index.files import default_folder

    store = opened(pool)
    _describe(opened_index(store, name, "ignore"), default_folder(store, name), as_json)


def _describe(index: AdapterIndex, folder: Path, as_json: bool) -> None:
    stats = index.stats()
    if as_json:
        print_json(dataclasses.asdict(stats) | {"folder": str(folder)})
        return
    stale = stats.threshold_stale
    per_key = "" if stats.bytes_per_key is None else f" ({stats.bytes_per_key:,.0f} per key)"
    rows = {
        "folder": str(folder),
        "keys": f"{stats.keys:,}" + (f" of width {stats.width}: {stats.rule}" if stats.width else ""),
        "adapters": f"{stats.records:,} with {stats.classes:,} classes",
        "without keys": ", ".join(stats.without_keys),
        "metric": stats.metric,
        "back-end": stats.backend or "none yet",
        "bytes": f"{stats.nbytes:,}{per_key}",
        "threshold": "not calibrated" if stats.threshold is None else f"{stats.threshold:.4f}{ANEW * stale}",
        "changes since": str(stats.changes),
    }
    table = Table(show_header=False)
    for key, value in rows.items():
        if value:
            table.add_row(key, shown(value))
    console.print(table)


def _features(pool: AdapterPool, inputs: Sequence[Path]) -> tuple[list[str], Any]:
    """Names of the inputs, and features float32 [N, D] under the bare backbone."""
    arrays = [path for path in inputs if path.suffix == ".npy"]
    if not arrays:
        files = _images(inputs)
        return [str(file) for file in files], _encoded(pool.backbone, files)
    if len(arrays) < len(inputs):
        raise ConfigError("give images or .npy files of features, not both at once")
    names, parts = [], []
    for path in arrays:
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:  # also a forged size
            raise DataError(f"{path} is no .npy file of numbers: {error}") from error
        if not isinstance(part, np.ndarray) or part.ndim != 2:
            raise DataError(f"{path}: features [N, D] are expected, got {list(np.shape(part))}")
        names += [f"{path}[{row}]" for row in range(len(part))]
        parts.append(part)
    if len({part.shape[1] for part in parts}) > 1:
        raise DataError("the .npy files hold features of different widths")
    return names, np.concatenate(parts)


def _images(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in inside if not path.is_dir() or file.suffix.lower() in SUFFIXES]
        if not found:
            raise DataError(f"{path} holds no image files ({', '.join(SUFFIXES)})")
        files += found
    return files


def _encoded(backbone: FrozenBackbone, inputs: Sequence[str] | Sequence[Path]) -> Tensor:
    """Features of texts or image files, on the CPU."""
    from cl_adapters.backbones.encode import encode

    return encode(backbone, inputs, BATCH).cpu()


def opened_index(pool: AdapterPool, name: str, stale: Any) -> AdapterIndex:
    """One of the pool's indexes."""
    from cl_adapters.index.files import default_folder
    from cl_adapters.index.index import AdapterIndex

    return AdapterIndex.open(default_folder(pool, _checked(name)), pool, stale=stale)


def _checked(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"an index's name is one word, not a path; got {name!r}")
    return name


def _is_known(hits: Sequence[Hit], threshold: float | None) -> bool | None:
    if threshold is None:
        return None
    return bool(hits) and hits[0].score >= threshold


def _class_of(hit: Hit) -> str:
    return str(hit.label) if hit.name is None else hit.name
