"""What a run measured: ``results.json`` and ``instruct.json``."""

from cl_adapters.benchmarks.results.results import DERIVED, FILE_NAME, SCHEMA_VERSION, Results, read, write

__all__ = ["DERIVED", "FILE_NAME", "SCHEMA_VERSION", "Results", "read", "write"]
