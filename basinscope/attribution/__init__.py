"""Harvesting attribution between a model's components over a data set."""
