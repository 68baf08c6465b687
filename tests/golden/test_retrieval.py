"""Self-refined retrieval on scripted predictions, and the ensemble of its two heads.

Origin: MOS, released code (mos.py:357-415) with its quirk that the final z always comes from the last evaluated
adapter, even when it points elsewhere; cosine head of inc_net.py:117-133. Expected values are written out in NumPy.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.bank.bank import Route
from cl_adapters.features import LazyFeatures
from cl_adapters.model.heads import PrototypeHead
from cl_adapters.predictors.base import Prediction
from cl_adapters.predictors.self_refine import SelfRefine


class Scripted:
    """A model of T tasks with one class each: the feature under adapter i is e_i, its prediction is ``goes_to[i]``."""

    device = torch.device("cpu")
    bank = None

    def __init__(self, start: int, goes_to: list[int]) -> None:
        self.num_slots = self.num_tasks = len(goes_to)
        self.task_of_column = self.slot_of_column = torch.arange(self.num_slots)
        self.rows = 3.0 * F.one_hot(torch.tensor(goes_to), self.num_slots).float()
        self.start = start
        self.evaluated: list[int] = []
        self.passes: list[int] = []

    def features(self, x: Tensor, route: Route) -> Tensor:
        slots = torch.tensor(route.slots)
        ids = slots[route.index_B] if route.index_B is not None else slots.expand(len(x))
        self.passes += ids.tolist()
        return F.one_hot(ids, self.num_slots).float()

    def prototypes(self, f_BD: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(f_BD),), self.start), self.num_slots).float()

    def head(self, f_BD: Tensor) -> Tensor:
        self.evaluated += f_BD.argmax(1).tolist()
        return f_BD @ self.rows


def predict(model: Any, x: Tensor, **options: Any) -> Prediction:
    return SelfRefine(**options).predict(cast(Any, model), LazyFeatures(cast(Any, model), x))


TRACES = [
    ("fixed point at once", 0, [0, 1, 2, 3, 4, 5], [0]),
    ("fixed point at once, elsewhere", 3, [0, 1, 2, 3, 4, 5], [3]),
    ("0 -> 1 -> 1", 0, [1, 1, 2, 3, 4, 5], [0, 1]),
    ("2-cycle 0 <-> 1", 0, [1, 0, 2, 3, 4, 5], [0, 1, 0, 1]),
    ("chain 0 -> 1 -> 2 -> 3 -> 4", 0, [1, 2, 3, 4, 4, 5], [0, 1, 2, 3]),
    ("chain from a later task", 5, [0, 5, 1, 2, 3, 4], [5, 4, 3, 2]),
]


@pytest.mark.parametrize(("start", "goes_to", "evaluations"), [t[1:] for t in TRACES], ids=[t[0] for t in TRACES])
def test_trace(start: int, goes_to: list[int], evaluations: list[int]) -> None:
    """Which adapters are evaluated, which one answers, and what it cost."""
    model = Scripted(start, goes_to)
    answer = predict(model, torch.zeros(1, 1), ensemble=False)
    assert model.evaluated == evaluations
    assert answer.adapter.tolist() == [evaluations[-1]]
    assert answer.logits[0].argmax().item() == goes_to[evaluations[-1]], "z as it is, even when it points elsewhere"
    assert sorted(model.passes) == sorted({0, *evaluations}), "no adapter runs twice"
    assert answer.passes.tolist() == [len({0, *evaluations})]


def test_images_of_one_batch_stop_on_their_own() -> None:
    """Three images: one stays at 0, one goes 1 -> 2 -> 2, one cycles 3 <-> 4."""

    class Mixed(Scripted):
        def prototypes(self, f_BD: Tensor) -> Tensor:
            return F.one_hot(torch.tensor([0, 1, 3]), self.num_slots).float()

    model = Mixed(0, [0, 2, 2, 4, 3])
    answer = predict(model, torch.zeros(3, 1), ensemble=False)
    assert answer.adapter.tolist() == [0, 2, 4]
    assert answer.logits.argmax(1).tolist() == [0, 2, 3]
    assert answer.passes.tolist() == [1, 3, 3]
    assert sorted(model.evaluated) == [0, 1, 2, 3, 3, 4, 4]


def test_at_most_max_steps_evaluations() -> None:
    model = Scripted(0, [1, 2, 3, 4, 4, 5])
    assert predict(model, torch.zeros(1, 1), max_steps=2).adapter.tolist() == [1]
    assert model.evaluated == [0, 1]


def softmax(v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e: npt.NDArray[np.float64] = np.exp(v)
    total: npt.NDArray[np.float64] = e / e.sum()
    return total


def test_ensemble_of_cosine_and_linear_head() -> None:
    """T = 3 tasks of 2, 1 and 2 classes, prototypes of any length: softmax(z) + softmax(3 cos)."""
    rng = np.random.default_rng(6)
    f, weight, bias = rng.standard_normal((4, 6)), rng.standard_normal((5, 6)), rng.standard_normal(5)
    means = rng.standard_normal((5, 6)) * [[0.1], [1.0], [5.0], [20.0], [3.0]]
    prototypes = PrototypeHead(6)
    prototypes.append(torch.from_numpy(means[:2]).float())
    prototypes.append(torch.from_numpy(means[2:]).float())

    class Model(Scripted):
        """The same features under every adapter, so the trace does not matter."""

        def __init__(self) -> None:
            super().__init__(0, [0, 1, 2])
            self.task_of_column = self.slot_of_column = torch.tensor([0, 0, 1, 2, 2])

        def features(self, x: Tensor, route: Route) -> Tensor:
            return x

        def prototypes(self, f_BD: Tensor) -> Tensor:
            return cast(Tensor, prototypes(f_BD))

        def head(self, f_BD: Tensor) -> Tensor:
            return F.linear(f_BD, torch.from_numpy(weight).float(), torch.from_numpy(bias).float())

    cosine = np.array([[a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for b in means] for a in f])
    z = f @ weight.T + bias
    assert np.abs(prototypes(torch.from_numpy(f).float()).numpy() - cosine).max() < 1e-6, "sigma is 1"
    for i in range(len(f)):  # one image at a time: a pass of LazyFeatures may take a part of the batch
        x = torch.from_numpy(f[i : i + 1]).float()
        both, alone = (predict(Model(), x, ensemble=e).logits[0].numpy() for e in (True, False))
        assert np.abs(both - (softmax(z[i]) + softmax(3 * cosine[i]))).max() < 1e-6
        assert np.abs(alone - z[i]).max() < 1e-5
