"""The errors are what callers catch: one family, and built-in parents that fit."""

from __future__ import annotations

import inspect

import pytest

from cl_adapters import errors
from cl_adapters.errors import ClAdaptersError, UnknownName, suggestion

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]


@pytest.mark.parametrize("cls", CLASSES)
def test_one_family(cls: type[Exception]) -> None:
    assert issubclass(cls, ClAdaptersError)
    assert cls.__doc__
    assert str(cls("what went wrong")) == "what went wrong"


@pytest.mark.parametrize(
    ("cls", "parent"),
    [
        (errors.UnknownName, ValueError),
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.IncompatibleBackbone, ValueError),
        (errors.BackboneUnavailable, OSError),
        (errors.StorageError, OSError),
        (errors.PoolError, errors.StorageError),
        (errors.PoolError, ValueError),
        (errors.TrainingDiverged, ArithmeticError),
    ],
)
def test_built_in_parents(cls: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(cls, parent)


def test_unknown_name_suggests_and_lists() -> None:
    error = UnknownName.of("strategy", "mso", {"sema": 1, "mos": 2})
    assert str(error) == "unknown strategy 'mso'; did you mean 'mos'? Known: mos, sema"


def test_unknown_name_without_anything_near_or_known() -> None:
    assert str(UnknownName.of("strategy", "xyz", ["mos"])) == "unknown strategy 'xyz'. Known: mos"
    assert str(UnknownName.of("strategy", "xyz", [])) == "unknown strategy 'xyz'. Known: none"
    assert suggestion("anything", iter(())) == "."
