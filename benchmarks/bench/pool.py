"""What a pool of many adapters costs: to open, in memory, and when every image of a batch has its own.

    python -m cl_adapters.benchmarks.bench.pool

The adapters are random, which costs what trained ones cost. Memory is the resident set of a fresh process that has
loaded the backbone. Batches are timed by turns in one process on one thread; the figures are medians of CPU time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.encode import image_preprocessing
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.benchmarks.bench._command import command_of
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool, NewAdapter, PoolClass

CLASSES = 2


def main(
    adapters: int = 500,
    backbone: str = "vit_glyph_tiny",
    batch: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int, typer.Option(help="Adapters in memory.")] = 64,
    repeats: int = 25,
    pool: Annotated[Path | None, typer.Option(help="Measure this one; default a new one of random adapters.")] = None,
) -> None:
    """Make the pool, then measure in a fresh process."""
    torch.set_num_threads(1)
    if pool is not None:
        measure(pool, batch, limit, repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        make(Path(folder) / "pool", FrozenBackbone.load(backbone), adapters)
        print(f"adding {adapters} adapters in one change  {time.perf_counter() - began:8.1f} s", flush=True)
        sizes = [f"--batch={batch}", f"--limit={limit}", f"--repeats={repeats}"]
        command = [sys.executable, "-m", "cl_adapters.benchmarks.bench.pool", f"--pool={folder}/pool", *sizes]
        subprocess.run(command, check=True)


def make(path: Path, backbone: FrozenBackbone, adapters: int) -> None:
    """A pool of random adapters with two random classes each."""
    adapter = Bottleneck()
    bank = AdapterBank(backbone, adapter)

    def one(task: int) -> NewAdapter:
        draw = torch.Generator().manual_seed(task)
        rows = torch.randn(CLASSES, backbone.num_features, generator=draw)
        return NewAdapter(
            tensors={key: 0.02 * torch.randn(value.shape, generator=draw) for key, value in bank.fresh(draw).items()},
            adapter=adapter,
            classes=[PoolClass(label=CLASSES * task + c) for c in range(CLASSES)],
            knowledge={
                "keys": rows,
                "key_class": torch.arange(CLASSES),
                "head.weight": rows,
                "head.bias": torch.zeros(CLASSES),
            },
        )

    AdapterPool.create(path, backbone).add_all(map(one, range(adapters)))


def measure(path: Path, batch: int, limit: int, repeats: int) -> None:
    """Print every figure."""
    card = AdapterPool.open(path).backbone_card
    backbone = FrozenBackbone.load(**card.source)
    x = torch.randn(batch, *image_preprocessing(backbone).input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        backbone(x)
    start = memory()
    began = time.perf_counter()
    pool = AdapterPool.open(path, backbone=backbone, limit=0)
    opened = time.perf_counter()
    print(f"opening the pool                        {1000 * (opened - began):8.1f} ms   {memory() - start:+8.1f} MiB")
    model = AdapterModel.from_pool(pool, limit=limit)
    made = time.perf_counter()
    print(f"a model of all {model.num_slots} adapters            {1000 * (made - opened):8.1f} ms   ", end="")
    print(f"{memory() - start:+8.1f} MiB")
    run(model, x, torch.arange(batch))
    print(f"first batch of {batch} over {batch} adapters      {ms_since(made)}   {memory() - start:+8.1f} MiB")
    turns = model.num_slots // batch
    began = time.perf_counter()
    for turn in range(turns):
        run(model, x, turn * batch + torch.arange(batch))
    each = 1000 * (time.perf_counter() - began) / max(turns, 1)
    print(f"batches over all adapters, from disk    {each:8.1f} ms   {memory() - start:+8.1f} MiB", end="")
    assert model.bank is not None
    print(f"   ({len(model.bank.loaded)} in memory)")
    one, many, head_one, head_many = medians(
        [
            lambda: run(model, x, torch.zeros(batch, dtype=torch.long)),
            lambda: run(model, x, torch.arange(batch)),
            lambda: run(model, x, torch.zeros(batch, dtype=torch.long), head=True),
            lambda: run(model, x, torch.arange(batch), head=True),
        ],
        repeats,
    )
    print(f"batch of {batch} with one adapter            {1000 * one:8.1f} ms")
    print(f"batch of {batch} over {batch} adapters            {1000 * many:8.1f} ms   ratio {many / one:.3f}")
    print(f"  with the head of {len(model.classes)} classes        {1000 * head_many:8.1f} ms   ", end="")
    print(f"ratio {head_many / head_one:.3f}")
    whole = AdapterModel.from_pool(pool, limit=model.num_slots)
    assert whole.bank is not None
    for slot in range(whole.num_slots):
        whole.bank.export(slot)
    print(f"all {whole.num_slots} adapters in memory                        {memory() - start:+8.1f} MiB")


def run(model: AdapterModel, x: torch.Tensor, slots: torch.Tensor, head: bool = False) -> None:
    """One forward pass of the backbone with these adapters."""
    with torch.inference_mode():
        f_BD = model.features(x, Route.hard(slots))
        if head:
            model.head(f_BD)


def medians(steps: list[Callable[[], None]], repeats: int) -> list[float]:
    """CPU seconds of each step, median over rounds in which they take turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 2):
        for step, times in zip(steps, seconds, strict=True):
            began = time.process_time()
            step()
            if turn >= 2:  # the first two warm up
                times.append(time.process_time() - began)
    return [statistics.median(times) for times in seconds]


def memory() -> float:
    """Resident set of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def ms_since(began: float) -> str:
    """Milliseconds since then, as a column."""
    return f"{1000 * (time.perf_counter() - began):8.1f} ms"


if __name__ == "__main__":
    command_of(main, __doc__)()
