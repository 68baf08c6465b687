"""The expandable router: growth, softmax over all rows, who gets gradients.

Origin: SEMA, released code sema_block.py:80-95 and 137-142: old rows are frozen, the new one trains under the softmax
over all K + 1 logits of p, the mean over all tokens. The expected numbers are written out in NumPy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError
from cl_adapters.parts.descriptors import Descriptors
from cl_adapters.parts.router import ExpandableRouter

WIDTH = 6


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, WIDTH, generator=gen(0))


def grown(rows: int) -> ExpandableRouter:
    """Block 2 with that many frozen rows; slots 0, 2, 4, ..."""
    mixture = ExpandableRouter({2: WIDTH, 3: 2 * WIDTH})
    for row in range(rows):
        mixture.grow(2, 2 * row, gen(10 + row))
    mixture.freeze()
    return mixture


def shares(mixture: ExpandableRouter, x_BND: Tensor) -> npt.NDArray[np.float64]:
    """softmax(R p + r) in NumPy, image by image."""
    values = {key: value.double().numpy() for key, value in mixture.tensors().items()}
    answers = []
    for image in x_BND.double().numpy():
        p = image.sum(axis=0) / len(image)
        logits = np.array(
            [values[f"at.2.{slot}.weight"] @ p + values[f"at.2.{slot}.bias"][0] for slot in mixture.slots(2)]
        )
        raised = np.exp(logits - logits.max())
        answers.append(raised / raised.sum())
    return np.array(answers)


def loss_of(mixture: ExpandableRouter, x: Tensor) -> Tensor:
    """Any loss that depends on every weight."""
    m_BK = mixture.weights(2, x)
    return (m_BK * torch.randn(m_BK.shape, generator=gen(3))).sum()


def test_softmax_over_all_rows(x: Tensor) -> None:
    mixture = grown(3)
    m_BK = mixture.weights(2, x)
    assert m_BK.shape == (5, 3)
    assert m_BK.double().numpy() == pytest.approx(shares(mixture, x), abs=1e-6)
    assert m_BK.std(0).min() > 1e-3, "one weight vector per image"
    mixture.grow(2, 6, gen(1))
    assert mixture.slots(2) == (0, 2, 4, 6)
    assert mixture.weights(2, x).detach().double().numpy() == pytest.approx(shares(mixture, x), abs=1e-6)


def test_feature_maps_are_pooled_over_all_places(x: Tensor) -> None:
    mixture = grown(2)
    map_BDHW = x.mT.reshape(5, WIDTH, 2, 2)
    assert torch.allclose(mixture.weights(2, map_BDHW), mixture.weights(2, x), atol=1e-6)


def test_growth_trains_the_new_row_alone(x: Tensor) -> None:
    """Old rows keep their bytes through steps with weight decay on everything that can be trained."""
    mixture = grown(2)
    old = {key: value.clone() for key, value in mixture.tensors().items()}
    new = mixture.grow(2, 9, gen(5))
    start = [value.detach().clone() for value in new]
    optimizer = torch.optim.SGD(mixture.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(mixture, x).backward()
        optimizer.step()
    now = mixture.tensors()
    assert set(now) - set(old) == {"at.2.9.weight", "at.2.9.bias"}
    assert all(torch.equal(value, now[key]) for key, value in old.items())
    assert {key for key, value in mixture.named_parameters() if value.grad is not None} == set(now) - set(old)
    assert all((value - before).abs().min() > 1e-4 for value, before in zip(new, start, strict=True))


def test_gradient_of_the_new_row(x: Tensor) -> None:
    """d loss / d logit_K = m_K (c_K - sum_k c_k m_k) for a loss sum c m; by hand."""
    mixture = grown(2)
    weight, bias = mixture.grow(2, 9, gen(5))
    loss_of(mixture, x).backward()
    m = shares(mixture, x)
    c = torch.randn(5, 3, generator=gen(3)).double().numpy()
    slope = m[:, 2] * (c[:, 2] - (c * m).sum(1))
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.double().numpy() == pytest.approx(slope @ x.double().mean(1).numpy(), abs=1e-6)
    assert float(bias.grad) == pytest.approx(slope.sum(), abs=1e-6)


def test_one_row_has_weight_one_and_no_gradient(x: Tensor) -> None:
    """Only weight decay moves the row of the first task."""
    mixture = ExpandableRouter({2: WIDTH})
    weight, bias = mixture.grow(2, 0, gen(0))
    start = weight.detach().clone()
    x = x.requires_grad_()
    m_B1 = mixture.weights(2, 100 * x)
    assert torch.equal(m_B1, torch.ones(5, 1))
    (m_B1 * torch.randn(5, 1, generator=gen(3))).sum().backward()
    for value in (weight, bias, x):
        assert value.grad is not None
        assert torch.equal(value.grad, torch.zeros_like(value))
    torch.optim.SGD([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.allclose(weight, 0.95 * start)


def test_start_values_are_those_of_a_linear_layer() -> None:
    """Weight and bias U(-1/sqrt(D), 1/sqrt(D)), all draws from the generator."""
    mixture = ExpandableRouter({0: 1000})
    weight, bias = mixture.grow(0, 0, gen(4))
    bound = 1000**-0.5
    assert weight.shape == (1000,)
    assert bias.shape == (1,)
    assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
    assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert abs(float(weight.detach().mean())) < 0.05 * bound
    biases = torch.cat([mixture.grow(0, slot, gen(slot))[1].detach() for slot in range(1, 200)])
    assert 0.9 * bound < float(biases.abs().max()) <= bound
    again = ExpandableRouter({0: 1000}).grow(0, 0, gen(4))
    assert torch.equal(again[0], weight)
    assert torch.equal(again[1], bias)
    assert weight.requires_grad
    assert bias.requires_grad


def test_new_entries_are_where_the_part_is() -> None:
    """Precision stands in for the device: what is added later follows the part."""
    mixture = ExpandableRouter({0: WIDTH}).double()
    descriptors = Descriptors({0: WIDTH}, dim=2, buffer=5).double()
    grown = [*mixture.grow(0, 0, gen(0)), *descriptors.grow(0, 0, gen(1))]
    assert {value.dtype for value in grown} == {torch.float64}
    assert [id(value) for value in grown] == [
        id(value) for part in (mixture, descriptors) for value in part.parameters()
    ]
    descriptors.descriptor(0, 0).records.add(torch.rand(4, generator=gen(2)))
    assert descriptors.z(0, torch.ones(3, WIDTH, dtype=torch.float64)).dtype == torch.float64


def test_freezing_one_block() -> None:
    mixture = ExpandableRouter({2: WIDTH, 3: WIDTH})
    here, there = mixture.grow(2, 0, gen(0)), mixture.grow(3, 0, gen(1))
    here[0].grad = torch.ones(WIDTH)
    mixture.freeze(2)
    assert [value.requires_grad for value in (*here, *there)] == [False, False, True, True]
    assert not [value for value in here if value.grad is not None]
    mixture.freeze()
    assert not any(value.requires_grad for value in there)


def test_what_does_not_fit_is_named(x: Tensor) -> None:
    mixture = grown(1)
    with pytest.raises(ClAdaptersError, match="block 5 is not expandable; these are: 2, 3"):
        mixture.grow(5, 1, gen(0))
    with pytest.raises(ClAdaptersError, match="slot 0 is known at block 2 already"):
        mixture.grow(2, 0, gen(0))
    with pytest.raises(ClAdaptersError, match="block 3 has no adapter to mix yet"):
        mixture.weights(3, x)
    with pytest.raises(ClAdaptersError, match="expandable blocks with widths of 1 or more are needed"):
        ExpandableRouter({})
