"""Estimators on stores. Never imports torch, so that a laptop analyses what a cluster sampled."""
