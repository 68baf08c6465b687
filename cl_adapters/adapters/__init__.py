"""ADAPTER TYPES, one file each: shapes, initial values and a pure function of tensors."""

from cl_adapters.adapters.base import AdapterType, adapters

__all__ = ["AdapterType", "adapters"]
