"""Frozen backbones: loading, forward passes, preprocessing, identity."""
