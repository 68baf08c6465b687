"""BENCHMARKS, one file each: a frozen dataclass of parameters with a ``load(seed)``."""
