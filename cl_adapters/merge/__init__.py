"""MERGE METHODS, one pure function per file: tensors in, new tensor out."""

from cl_adapters.merge.base import MergeMethod, merges

__all__ = ["MergeMethod", "merges"]
