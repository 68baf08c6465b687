"""What every registered merge method keeps: a pure function of tensors of one shape."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError, ConfigError, UnknownName
from cl_adapters.merge import merges
from cl_adapters.merge.base import is_linear


@pytest.fixture(params=merges.names())
def merge(request: pytest.FixtureRequest) -> Any:
    return merges.get(request.param)


def two(shape: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def test_options_have_defaults_and_types(merge: Any) -> None:
    first, *options = inspect.signature(merge).parameters.values()
    assert first.name == "tensors"
    assert all(option.default is not inspect.Parameter.empty for option in options)
    assert all(option.annotation is not inspect.Parameter.empty for option in options)
    assert merge.__doc__


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_tensor_of_the_same_shape_and_type(merge: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = two(shape, dtype)
    kept = [tensor.clone() for tensor in tensors]
    merged = merge(tensors)
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert merged.isfinite().all()
    merged.add_(1)
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True)), (
        "inputs are not written"
    )


def test_a_function_of_its_inputs_alone(merge: Any) -> None:
    before = torch.get_rng_state()
    assert torch.equal(merge(two()), merge(two()))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_strides_change_nothing(merge: Any) -> None:
    tensors = two()
    transposed = [tensor.T.contiguous().T for tensor in tensors]
    assert torch.equal(merge(tensors), merge(transposed))


def test_unknown_name() -> None:
    with pytest.raises(UnknownName, match=r"unknown merge method 'meann'; did you mean 'mean'.*Known: .*ema, .*mean"):
        merges.get("meann")


def test_linear_methods_are_linear_and_only_they(merge: Any) -> None:
    """The mark is what lets low-rank adapters be merged from coefficients alone."""
    one, other = two((4, 5), torch.float64), [t.flip(0) for t in two((4, 5), torch.float64)]
    summed = merge([a + 2 * b for a, b in zip(one, other, strict=True)])
    assert torch.allclose(summed, merge(one) + 2 * merge(other)) == is_linear(merge) or merge is merges.get("dare"), (
        "dare is linear for one seed, but its masks differ from number to number"
    )
    coefficients = merge(list(torch.eye(2, dtype=torch.float64)))
    by_coefficients = sum(c * t for c, t in zip(coefficients, one, strict=True))
    assert torch.allclose(merge(one), by_coefficients) == is_linear(merge)


def with_base() -> list[str]:
    return [name for name in merges.names() if "base" in inspect.signature(merges.get(name)).parameters]


@pytest.mark.parametrize("name", with_base())
def test_a_base_is_the_origin_of_the_changes(name: str) -> None:
    """Merging around a base is merging the differences to it, and a tensor that stays there changes nothing."""
    merge, tensors = merges.get(name), two(dtype=torch.float64)
    base = torch.full((3, 4), 0.5, dtype=torch.float64)
    kept = base.clone()
    assert torch.allclose(merge(tensors, base=base), base + merge([t - base for t in tensors]))
    assert torch.allclose(merge([base, base], base=base), base)
    assert torch.equal(base, kept)


@pytest.mark.parametrize("name", with_base())
@pytest.mark.parametrize("wrong", [[], [torch.ones(2), torch.ones(3)]])
def test_tensors_that_do_not_fit(name: str, wrong: list[Tensor]) -> None:
    with pytest.raises(ClAdaptersError, match="of one shape and at least one"):
        merges.get(name)(wrong)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"density": 0.0}, r"density must be in \(0, 1\], got 0"),
        ("magnitude", {"density": 1.1}, r"density must be in \(0, 1\], got 1.1"),
        ("dare", {"drop": 1.0}, r"drop must be in \[0, 1\), got 1"),
        ("dare", {"drop": float("nan")}, "drop must be"),
        ("weighted", {"metrics": [1.0]}, "metrics must be 2 finite numbers"),
        ("weighted", {"metrics": [1.0, float("inf")]}, "metrics must be 2 finite numbers"),
        ("weighted", {"metrics": [0.0, 0.0]}, "at least 0 and not all 0"),
        ("weighted", {"metrics": [-1.0, 2.0]}, "give a temperature"),
        ("weighted", {"metrics": [1.0, 2.0], "temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merges.get(name)(two(), **options)
