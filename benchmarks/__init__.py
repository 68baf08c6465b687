"""Benchmarks, runner, report and command line."""

if __name__ != "cl_adapters.benchmarks":  # imported by its short name from a checkout's root
    from cl_adapters._alias import alias

    alias(__name__, "cl_adapters.benchmarks", __file__)
