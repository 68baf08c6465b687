"""INDEX BACK-ENDS, one file each, and the index of a pool: which adapters know this input?"""

from cl_adapters.index.backends.base import IndexBackend, indexes

__all__ = ["IndexBackend", "indexes"]
