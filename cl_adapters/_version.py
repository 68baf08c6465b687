"""The installed version."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("cl-adapters")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+checkout"
