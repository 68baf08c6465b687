"""MERGE METHODS, one pure function per file: tensors in, new tensor out. Whole adapters: :func:`merge_adapters`."""

from cl_adapters.merge.adapters import MergedAdapter, MergeReport, merge_adapters
from cl_adapters.merge.base import MergeMethod, merges

__all__ = ["MergeMethod", "MergeReport", "MergedAdapter", "merge_adapters", "merges"]
