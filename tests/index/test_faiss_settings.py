"""Settings of the library that are global: ours inside a call, the user's after it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cl_adapters.index import indexes
from cl_adapters.index.backends._faiss import GEMM_FROM, library, settings


def test_put_back_after_the_last_of_several_calls() -> None:
    faiss = library()
    before = (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads())
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with settings(1, 100):
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    inside.wait(30)
    with settings(2, 100):
        assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == (GEMM_FROM, 2)
    assert faiss.cvar.distance_compute_blas_threshold == GEMM_FROM  # the other call is still inside
    leave.set()
    other.join()
    assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == before
    with pytest.raises(RuntimeError), settings(1, 100):
        raise RuntimeError
    with settings(1, GEMM_FROM - 1):
        assert faiss.cvar.distance_compute_blas_threshold == before[0]
    assert (faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()) == before


@pytest.mark.parametrize("name", indexes.names())
def test_every_back_end_leaves_them(name: str) -> None:
    cvar = library().cvar
    before = cvar.distance_compute_blas_threshold
    vectors = np.random.default_rng(0).standard_normal((400, 8), dtype=np.float32)
    index = indexes.get(name).build(vectors, np.arange(400), metric="l2")
    index.threads = 2
    index.search(vectors[:64], 3)
    assert cvar.distance_compute_blas_threshold == before
