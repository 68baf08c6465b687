"""Measurements: every table of the README and the docs."""
