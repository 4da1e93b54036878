"""Chains: from a model and data sets to a store of per-token losses."""
