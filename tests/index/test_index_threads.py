"""Queries beside changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from cl_adapters import AdapterIndex
from cl_adapters.index import indexes
from tests.index.conftest import LABELS, QUERIES, MemoryPool


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


class Meeting:
    """Two calls in two threads; the first waits inside for the second to come in too, for a moment."""

    def __init__(self) -> None:
        self.first_in = threading.Event()
        self.second_in = threading.Event()
        self.met = False

    def first(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def stay(*args: Any, **options: Any) -> Any:
            self.first_in.set()
            self.met |= self.second_in.wait(0.3)
            return call(*args, **options)

        return stay

    def second(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def come(*args: Any, **options: Any) -> Any:
            self.second_in.set()
            return call(*args, **options)

        return come


def run_beside(meeting: Meeting, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    with ThreadPoolExecutor(2) as workers:
        one = workers.submit(first)
        assert meeting.first_in.wait(30)
        other = workers.submit(second)
        return one.result(30), other.result(30)


@pytest.mark.parametrize("change", ["remove", "add"])
def test_a_change_and_a_query_never_meet(pool: MemoryPool, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a query see a change half done, nor is anything changed under a query."""
    for query_first in (False, True):
        index = AdapterIndex.build(pool, backend="exact")
        if change == "add":
            index.remove(["task-000"])
        backend, meeting = index.backend, Meeting()
        assert backend is not None
        changing, asking = (meeting.second, meeting.first) if query_first else (meeting.first, meeting.second)
        act = partial(getattr(index, change), ["task-000"])
        with monkeypatch.context() as patch:
            patch.setattr(backend, "search", asking(backend.search))
            for name in ("add", "remove"):
                patch.setattr(backend, name, changing(getattr(backend, name)))

            def ask(index: AdapterIndex = index) -> Any:
                return index.query(QUERIES[6:], 1)

            if query_first:
                answers, _ = run_beside(meeting, ask, act)
            else:
                _, answers = run_beside(meeting, act, ask)
        assert not meeting.met, (change, query_first)
        assert [row[0].label for row in answers] == LABELS[6:].tolist()


def test_queries_do_meet(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    index, meeting = AdapterIndex.build(pool, backend="exact"), Meeting()
    calls = iter((meeting.first(index._contents.search), meeting.second(index._contents.search)))
    monkeypatch.setattr(index._contents, "search", lambda *args: next(calls)(*args))
    run_beside(meeting, lambda: index.query(QUERIES, 1), lambda: index.query(QUERIES, 1))
    assert meeting.met


def test_names_beside_a_change_in_another_thread(pool: MemoryPool) -> None:
    """Names that were looked up are used, though another thread has put its own in the same place."""

    class Raced(AdapterIndex):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_names":  # at once another thread does the same for another state of the pool
                super().__setattr__(name, ((), {}))

    wanted = AdapterIndex.build(pool, backend="exact").query(QUERIES, 2)
    assert Raced.build(pool, backend="exact").query(QUERIES, 2) == wanted
