"""What an index of keys costs: building, asking, memory, opening; and how often it finds the nearest key.

    python -m cl_adapters.benchmarks.bench.index --keys 1000 10000 100000 --width 384 768
    python -m cl_adapters.benchmarks.bench.index --keys 1000000 --width 384 --backend auto

Keys are unit vectors in clusters of 100: a random direction plus noise of half its length, drawn from a seed; queries
are drawn the same way. The metric is the cosine, everything runs on one thread. Building and asking are CPU time (the
median over queries), so that other load on the machine does not count; saving and opening are wall clock, opening with
the first answer. Recall@1 is the share of queries whose best key is the one of a full scan in float32. Bytes per key
are those in memory while the index is built; opened from disk, "ivf" and "exact" leave the vectors there.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from cl_adapters._seeding import derive
from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.index import IndexBackend, indexes
from cl_adapters.index.backends.base import Floats, Ids
from cl_adapters.index.backends.exact import nearest
from cl_adapters.index.contents import choose

CLUSTER = 100
NOISE = 0.5
BLOCK = 50_000
HEAD = ("back-end", "D", "keys", "build s", "ms/query b1", "ms/query b32", "recall@1", "bytes/key", "save s", "open s")


def main(
    keys: Annotated[list[int] | None, typer.Option(help="How many; default 1000 10000 100000.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Of the keys; default 384 768.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(["auto", *indexes.names()]), help="auto, or as in `cl-adapters list indexes`."),
    ] = None,
    queries: int = 192,
    seed: int = 0,
    folder: Annotated[
        Path | None, typer.Option(help="Where indexes are saved for a moment; default the system's place.")
    ] = None,
) -> None:
    """Print one Markdown row per back-end, width and number of keys."""
    torch.set_num_threads(1)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    for wide in width or [384, 768]:
        for many in keys or [1_000, 10_000, 100_000]:
            vectors = np.concatenate(list(drawn(many, many, wide, seed, "keys")))
            asked = np.concatenate(list(drawn(queries, many, wide, seed, "queries")))
            truth = nearest(vectors, asked, 1, "ip")[1][:, 0]
            for name in backend or ["auto"]:
                print(f"| {measured(name, vectors, asked, truth, seed, folder)} |", flush=True)


def drawn(n: int, keys: int, width: int, seed: int, purpose: str) -> Iterator[Floats]:
    """Clustered unit vectors, in blocks float32 [<= BLOCK, width]; ``keys`` says how many clusters there are."""
    centres = np.random.default_rng(derive(seed, "centres")).standard_normal(
        (max(1, keys // CLUSTER), width), dtype=np.float32
    )
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for start in range(0, n, BLOCK):
        draw = np.random.default_rng(derive(seed, purpose, start))
        size = min(BLOCK, n - start)
        x = draw.standard_normal((size, width), dtype=np.float32)
        x *= NOISE / width**0.5
        x += centres[draw.integers(0, len(centres), size)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        yield x


def measured(name: str, vectors: Floats, queries: Floats, truth: Ids, seed: int, folder: Path | None) -> str:
    """Build, ask, save and open one index; the row of the table without its outer bars."""
    keys, width = vectors.shape
    chosen = choose(keys, width) if name == "auto" else name
    start = time.process_time()
    index = indexes.get(chosen).build(vectors, np.arange(keys), metric="ip", seed=seed)
    build = time.process_time() - start
    single, found = [], []
    for query in queries:
        start = time.process_time()
        found.append(index.search(query[None], 1)[1][0, 0])
        single.append(time.process_time() - start)
    batches = [queries[i : i + 32] for i in range(0, len(queries) - 31, 32)]
    batched = []
    for batch in batches:
        start = time.process_time()
        index.search(batch, 1)
        batched.append((time.process_time() - start) / len(batch))
    recall = float((np.array(found) == truth).mean())
    per_key = index.nbytes / keys
    save, opened = saved_and_opened(index, queries, found, folder)
    figures = (
        f"{build:.1f}",
        f"{1e3 * statistics.median(single):.3f}",
        f"{1e3 * statistics.median(batched):.3f}" if batched else "-",
        f"{recall:.3f}",
        f"{per_key:.0f}",
        f"{save:.2f}",
        f"{opened:.3f}",
    )
    return " | ".join((chosen if name == chosen else f"{name}: {chosen}", str(width), f"{keys:,}", *figures))


def saved_and_opened(
    index: IndexBackend, queries: Floats, found: list[int], folder: Path | None
) -> tuple[float, float]:
    """Seconds to save an index, and to open it memory-mapped and get the first answer."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        start = time.perf_counter()
        index.save(place)
        save = time.perf_counter() - start
        start = time.perf_counter()
        first = IndexBackend.load(place).search(queries[:1], 1)[1][0, 0]
        opened = time.perf_counter() - start
        assert first == found[0], "the opened index answers like the saved one"
        return save, opened
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    command_of(main, __doc__)()
