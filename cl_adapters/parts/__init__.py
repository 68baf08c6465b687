"""PARTS, one file each: what a strategy keeps beside adapters and heads, saved with the model."""

from cl_adapters.parts.base import Part, parts

__all__ = ["Part", "parts"]
