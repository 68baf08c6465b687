"""``python -m cl_adapters.benchmarks.cli``: the ``cl-adapters`` command."""

from cl_adapters.benchmarks.cli import main

if __name__ == "__main__":
    main()
