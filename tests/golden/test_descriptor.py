"""Representation descriptors: start, errors and updates, against the formulas written out in NumPy.

Origin: SEMA, released code sema_components.py: a linear autoencoder D -> d -> D on p, the mean over the tokens;
e = mean over D of (p_hat - p)^2; plain SGD with momentum and weight decay, cosine to 0. The released code does not
detach p; its update is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from cl_adapters.errors import ClAdaptersError, TrainingDiverged
from cl_adapters.parts.descriptors import Descriptors, pooled, train_descriptors

Array = npt.NDArray[np.float64]
WIDTH, DIM = 6, 2
LR, MOMENTUM, DECAY = 0.5, 0.9, 0.01
Batches = Callable[[int], Iterable[Mapping[int, Tensor]]]


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grown(*pairs: tuple[int, int], buffer: int = 7) -> Descriptors:
    descriptors = Descriptors({4: WIDTH, 5: WIDTH}, dim=DIM, buffer=buffer)
    for block, slot in pairs:
        descriptors.grow(block, slot, gen(10 * block + slot))
    return descriptors


def batches(epoch: int) -> Iterator[dict[int, Tensor]]:
    """Three batches of 4, 4 and 2 images per epoch; other images in every epoch, and at every block."""
    for step, size in enumerate((4, 4, 2)):
        p = torch.randn(size, 2, WIDTH, generator=gen(100 * epoch + step))
        yield {4: p[:, 0], 5: p[:, 1]}


def train(
    descriptors: Descriptors,
    pairs: Sequence[tuple[int, int]],
    epochs: int,
    given: Batches = batches,
    report: Callable[[int, float], None] | None = None,
) -> None:
    train_descriptors(
        descriptors, pairs, given, epochs=epochs, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, report=report
    )


def weights(descriptors: Descriptors, block: int, slot: int) -> dict[str, Array]:
    own = descriptors.descriptor(block, slot).named_parameters()
    return {name: value.detach().double().numpy().copy() for name, value in own}


def error_and_slopes(w: dict[str, Array], p: Array) -> tuple[Array, dict[str, Array]]:
    """e per image, and the gradient of their mean, by the chain rule."""
    hidden = p @ w["encode.weight"].T + w["encode.bias"]
    off = hidden @ w["decode.weight"].T + w["decode.bias"] - p
    d_out = 2 * off / off.size
    d_hidden = d_out @ w["decode.weight"]
    slopes = {
        "encode.weight": d_hidden.T @ p,
        "encode.bias": d_hidden.sum(0),
        "decode.weight": d_out.T @ hidden,
        "decode.bias": d_out.sum(0),
    }
    return (off**2).mean(1), slopes


def by_hand(w: dict[str, Array], block: int, epochs: int) -> list[float]:
    """Train ``w`` in place; the errors of all images in order, each from before its step."""
    seen: list[float] = []
    velocity = {name: np.zeros_like(value) for name, value in w.items()}
    for epoch in range(epochs):
        lr = LR * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for batch in batches(epoch):
            errors, slopes = error_and_slopes(w, batch[block].double().numpy())
            seen += errors.tolist()
            for name in w:
                slope = slopes[name] + DECAY * w[name]
                velocity[name] = MOMENTUM * velocity[name] + slope
                w[name] = w[name] - lr * velocity[name]
    return seen


def test_start_values() -> None:
    """Kaiming-uniform with a = sqrt 5: U(+-1/sqrt(inputs)), the inputs of the decoder being d; biases 0."""
    descriptors = Descriptors({0: 768}, dim=128, buffer=500)
    grown = descriptors.grow(0, 0, gen(1))
    assert [tuple(value.shape) for value in grown] == [(128, 768), (128,), (768, 128), (768,)]
    assert sum(value.numel() for value in grown) == 197_504  # of the paper's sizes
    for weight, inputs in ((grown[0], 768), (grown[2], 128)):
        assert 0.99 * inputs**-0.5 < float(weight.detach().abs().max()) <= inputs**-0.5
        assert float(weight.detach().std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.02)
    assert not grown[1].any()
    assert not grown[3].any()
    random_state = torch.get_rng_state()
    again = Descriptors({0: 768}, dim=128, buffer=500).grow(0, 0, gen(1))
    assert all(torch.equal(a, b) for a, b in zip(grown, again, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state), "every draw comes from the generator"
    assert len(descriptors.descriptor(0, 0).records) == 0
    assert descriptors.descriptor(0, 0).records.size == 500


def test_error_is_the_mean_over_the_width() -> None:
    descriptors = grown((4, 0))
    for parameter in descriptors.parameters():
        parameter.data.normal_(generator=gen(2))
    x_BND = torch.randn(3, 5, WIDTH, generator=gen(3))
    p = x_BND.double().numpy().sum(1) / 5
    expected, _ = error_and_slopes(weights(descriptors, 4, 0), p)
    assert descriptors.descriptor(4, 0)(pooled(x_BND)).detach().double().numpy() == pytest.approx(expected, rel=1e-5)


def test_training_by_hand() -> None:
    """Two descriptors side by side: each as if alone. The buffer of 7 ends with the last 7 images of the last epoch."""
    descriptors = grown((4, 0), (4, 1), (5, 1))
    bystander = weights(descriptors, 4, 0)
    expected = {pair: weights(descriptors, *pair) for pair in ((4, 1), (5, 1))}
    told: list[tuple[int, float]] = []
    train(descriptors, list(expected), epochs=3, report=lambda epoch, loss: told.append((epoch, loss)))
    losses = np.zeros(3)
    for (block, slot), w in expected.items():
        seen = by_hand(w, block, epochs=3)
        found = weights(descriptors, block, slot)
        for name in w:
            assert found[name] == pytest.approx(w[name], abs=1e-5), name
        # filled with the first 7 (of 8), then sliding
        assert descriptors.descriptor(block, slot).records.values.numpy() == pytest.approx(seen[-7:], abs=1e-5)
        per_batch = [np.mean(seen[start : start + size]) for epoch in range(3) for start, size in spans(10 * epoch)]
        losses += np.array(per_batch).reshape(3, 3).mean(1)
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert [loss for _, loss in told] == pytest.approx(losses, abs=1e-5)
    same = weights(descriptors, 4, 0)
    assert all(np.array_equal(same[name], bystander[name]) for name in same), "others stay as they are"
    assert len(descriptors.descriptor(4, 0).records) == 0


def spans(start: int) -> list[tuple[int, int]]:
    """First image and number of images of the three batches of an epoch."""
    return [(start, 4), (start + 4, 4), (start + 8, 2)]


def test_same_update_with_and_without_detached_input() -> None:
    """The unused gradients that reach the network when p is not detached change nothing in the descriptor."""
    image = torch.randn(8, 3, WIDTH, generator=gen(7))
    ends = []
    for detached in (True, False):
        network = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            network.weight.copy_(torch.randn(WIDTH, WIDTH, generator=gen(8)))
            network.bias.zero_()
        descriptor = grown((4, 0)).descriptor(4, 0)
        optimizer = torch.optim.SGD(descriptor.parameters(), LR, MOMENTUM, weight_decay=DECAY)
        for _ in range(3):
            optimizer.zero_grad()
            p_BD = pooled(network(image))
            descriptor(p_BD.detach() if detached else p_BD).mean().backward()
            optimizer.step()
        assert (network.weight.grad is None) == detached
        ends.append(list(descriptor.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], next(grown((4, 0)).parameters()))


def test_training_sends_no_gradient_into_the_network() -> None:
    """Pooled inputs that hang on a graph: nothing flows back, and the update is that of plain ones."""
    source = torch.ones(1, requires_grad=True)
    plain, hanging = grown((4, 0)), grown((4, 0))
    train(plain, [(4, 0)], epochs=2)
    train(hanging, [(4, 0)], epochs=2, given=lambda epoch: ({4: source * b[4]} for b in batches(epoch)))
    assert source.grad is None
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), hanging.state_dict().values(), strict=True)
    )


def test_nothing_to_train() -> None:
    descriptors = grown((4, 0))
    before = weights(descriptors, 4, 0)
    train(descriptors, [], epochs=2)
    train(descriptors, [(4, 0)], epochs=0)
    after = weights(descriptors, 4, 0)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_is_said_and_never_recorded() -> None:
    descriptors = grown((4, 0))
    p_BD = torch.full((2, WIDTH), math.inf)
    with pytest.raises(TrainingDiverged, match=r"descriptors became (nan|inf) in epoch 1; lower .* \(now 0.5\)"):
        train(descriptors, [(4, 0)], epochs=1, given=lambda epoch: [{4: p_BD}])
    assert len(descriptors.descriptor(4, 0).records) == 0


def test_what_does_not_exist_is_named() -> None:
    descriptors = grown((4, 0))
    with pytest.raises(ClAdaptersError, match="no descriptor of slot 3 at block 4"):
        descriptors.descriptor(4, 3)(torch.zeros(1, WIDTH))
    with pytest.raises(ClAdaptersError, match="block 6 is not expandable; these are: 4, 5"):
        descriptors.grow(6, 0, gen(0))
    with pytest.raises(ClAdaptersError, match="slot 0 is known at block 4 already"):
        descriptors.grow(4, 0, gen(0))
    with pytest.raises(ClAdaptersError, match="must be 1 or more, got 0"):
        Descriptors({4: WIDTH}, dim=0, buffer=5)
