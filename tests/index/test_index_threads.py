"""Queries beside changes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cl_adapters import AdapterIndex
from cl_adapters.index import indexes
from tests.index.conftest import QUERIES, MemoryPool


@pytest.mark.parametrize("backend", indexes.names())
def test_reads_run_beside_changes(pool: MemoryPool, backend: str) -> None:
    index = AdapterIndex.build(pool, backend=backend)
    wanted, stop = index.query(QUERIES[6:], 1), threading.Event()

    def change() -> None:
        while not stop.is_set():
            index.remove(["task-000"])
            index.add(["task-000"])

    with ThreadPoolExecutor(5) as workers:
        changing = workers.submit(change)
        reading = [workers.submit(index.query, QUERIES[6:], 1) for _ in range(40)]
        answers = [each.result() for each in reading]
        stop.set()
        changing.result()
    for answer in answers:
        for got, expected in zip(answer, wanted, strict=True):
            assert (got[0].record, got[0].label) == (expected[0].record, expected[0].label)
            assert got[0].score == pytest.approx(expected[0].score, abs=0.02)
