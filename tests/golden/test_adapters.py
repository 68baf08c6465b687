"""Adapter outputs at fixed weights, against the formulas written out in NumPy.

Origin of the formulas: MOS ``delta = 0.1 (W_up ReLU(W_down x + b_down) + b_up)`` (released vit_mos.py:31-90), SEMA the
same with scale 1 (sema_components.py:46-53), LAE ``s (W2 GELU(W1 n + b1) + b2)`` with a learned s. The numbers are
computed here in float64, from weights drawn by NumPy; nothing of the code under test takes part.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.adapters.conv_bottleneck import ConvBottleneck
from cl_adapters.sites.sites import Site, Tap

Array = npt.NDArray[np.float64]
WIDTH, RANK = 768, 16
SITE = Site("blocks.0.ffn", 0, "ffn_parallel", WIDTH, Tap("norm2", "in"), Tap("drop_path2", "out"))


def weights(rng: np.random.Generator) -> dict[str, Array]:
    shapes = {"down": (RANK, WIDTH), "down_bias": (RANK,), "up": (WIDTH, RANK), "up_bias": (WIDTH,)}
    return {name: rng.standard_normal(shape) * 0.1 for name, shape in shapes.items()}


def relu(v: Array) -> Array:
    positive: Array = np.where(v > 0, v, 0.0)
    return positive


def gelu(v: Array) -> Array:
    cdf: Array = np.array([0.5 * (1 + math.erf(u / math.sqrt(2))) for u in v.flat]).reshape(v.shape)
    return v * cdf


def expected(x: Array, w: dict[str, Array], scale: float, gelu_instead: bool = False) -> Array:
    hidden = x @ w["down"].T + w["down_bias"]
    hidden = gelu(hidden) if gelu_instead else relu(hidden)
    return scale * (hidden @ w["up"].T + w["up_bias"])


def run(adapter: Bottleneck, x: Array, w: dict[str, Array]) -> Array:
    params = {name: torch.from_numpy(value).float() for name, value in w.items()}
    return adapter.apply(torch.from_numpy(x).float(), params).double().numpy()


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(1).standard_normal((2, 5, WIDTH))


@pytest.fixture
def w() -> dict[str, Array]:
    return weights(np.random.default_rng(2))


def test_mos_scale_one_tenth_also_on_the_bias(x: Array, w: dict[str, Array]) -> None:
    """The defaults are those of MOS: r 16, ReLU, scale 0.1, no norm on the input."""
    delta = run(Bottleneck(), x, w)
    assert np.abs(delta - expected(x, w, 0.1)).max() < 2e-6
    # with b_up outside the scale, as in a plain AdaptFormer, the difference is 0.9 b_up: this check would see it
    assert np.abs(0.9 * w["up_bias"]).max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 1])
def test_sema_scale_one(x: Array, w: dict[str, Array], scale: float) -> None:
    """Scale 1, given as a float or as an int."""
    delta = run(Bottleneck(scale=scale, dropout=0.0), x, w)
    assert np.abs(delta - expected(x, w, 1.0)).max() < 2e-5


def test_lae_gelu_with_learned_scale(x: Array, w: dict[str, Array]) -> None:
    """Exact GELU (with erf) and a scale that is one of the tensors; the option's value is only its start."""
    adapter = Bottleneck(activation="gelu", learn_scale=True, scale=1.0, bottleneck=RANK)
    delta = run(adapter, x, w | {"scale": np.array([1.7])})
    assert np.abs(delta - expected(x, w, 1.7, gelu_instead=True)).max() < 2e-5
    assert adapter.init(SITE, torch.Generator().manual_seed(0))["scale"].tolist() == [1.0]


def test_number_of_parameters_of_lae() -> None:
    """Bottleneck 5 parallel to the attention, with biases and a scale: 8,454 per block, 42,270 in five blocks."""
    adapter = Bottleneck(place="attn", bottleneck=5, activation="gelu", learn_scale=True, scale=1.0, dropout=0.0)
    assert adapter.site_kinds == ("attn_parallel",)
    assert adapter.num_parameters(SITE) == 8_454
    assert 5 * adapter.num_parameters(SITE) == 42_270
    assert ConvBottleneck().num_parameters(SITE) == 8_454, "the same numbers as 1 x 1 convolutions"


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_as_loops_over_the_map(kernel: int) -> None:
    """LAE on ConvNeXt, s (W2 GELU(W1 x + b1) + b2) at every place; with kernel 3 Convpass's convolution between.

    Convpass (released vtab/convpass.py): GELU, a full convolution with zeros around the map, GELU, up.
    """
    rng, r, width = np.random.default_rng(3), 4, 12
    x = rng.standard_normal((2, width, 3, 5))
    w = {"down": (r, width), "down_bias": (r,), "up": (width, r), "up_bias": (width,)}
    w |= {"conv": (r, r, 3, 3), "conv_bias": (r,)} if kernel == 3 else {}
    params = {name: rng.standard_normal(shape) for name, shape in w.items()} | {"scale": np.array([-0.6])}
    hidden = np.einsum("rd,bdhw->brhw", params["down"], x) + params["down_bias"][:, None, None]
    hidden = gelu(hidden)
    if kernel == 3:
        around = np.pad(hidden, ((0, 0), (0, 0), (1, 1), (1, 1)))
        hidden = np.zeros_like(hidden) + params["conv_bias"][:, None, None]
        for i in range(3):
            for j in range(3):
                seen = around[:, :, i : i + 3, j : j + 5]
                hidden = hidden + np.einsum("or,brhw->bohw", params["conv"][:, :, i, j], seen)
        hidden = gelu(hidden)
    wanted = -0.6 * (np.einsum("dr,brhw->bdhw", params["up"], hidden) + params["up_bias"][:, None, None])
    tensors = {name: torch.from_numpy(value) for name, value in params.items()}
    delta = ConvBottleneck(bottleneck=r, kernel=kernel).apply(torch.from_numpy(x), tensors)
    assert np.abs(delta.numpy() - wanted).max() < 1e-12


def test_fresh_inner_convolution_is_the_identity() -> None:
    """As in Convpass: the bottleneck passes through unchanged, so kernel 3 starts where kernel 1 does (with ReLU)."""
    wide, narrow = (ConvBottleneck(kernel=kernel, activation="relu") for kernel in (3, 1))
    params = wide.init(SITE, torch.Generator().manual_seed(0))
    params["up"].normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, WIDTH, 4, 4, generator=torch.Generator().manual_seed(2))
    without = {name: value for name, value in params.items() if not name.startswith("conv")}
    assert torch.allclose(wide.apply(x, params), narrow.apply(x, without), atol=1e-5)


def test_new_adapter_adds_exactly_nothing(x: Array) -> None:
    """MOS: W_down Kaiming-uniform with a = sqrt 5, so U(-1/sqrt(768), 1/sqrt(768)), everything else 0."""
    adapter = Bottleneck()
    params = adapter.init(SITE, torch.Generator().manual_seed(0))
    delta = adapter.apply(torch.from_numpy(x).float(), params)
    assert torch.equal(delta, torch.zeros(2, 5, WIDTH))
    bound = 1 / math.sqrt(WIDTH)
    assert bound * 0.99 < float(params["down"].abs().max()) <= bound
    assert float(params["down"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(not params[name].any() for name in ("down_bias", "up", "up_bias"))
