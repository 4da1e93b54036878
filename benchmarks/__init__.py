"""Paired measurements against the incumbents; see ``harness.py``."""
