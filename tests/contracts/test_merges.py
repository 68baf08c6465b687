"""What every registered merge method keeps: a pure function of tensors of one shape."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.errors import UnknownName
from cl_adapters.merge import merges


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
    with pytest.raises(UnknownName, match=r"unknown merge method 'meann'; did you mean 'mean'.*Known: .*ema, mean"):
        merges.get("meann")
