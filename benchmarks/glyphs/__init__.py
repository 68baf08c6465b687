"""Rendered characters, and the pre-training of the embedded backbone on them."""
