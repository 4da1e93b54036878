"""Stores: what is written, how, and in which state it is."""
