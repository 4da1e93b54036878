"""Basinscope: measure the loss basin around a trained model.

Importing this package is inert: no torch, no device probe. Names load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from basinscope.activations import ActivationLoader, ActivationSaver
    from basinscope.analysis.attribution import AttributionStore
    from basinscope.analysis.bif import compute_bif
    from basinscope.analysis.chance import bif_chance
    from basinscope.analysis.comparison import compare_llc
    from basinscope.analysis.llc import compute_llc
    from basinscope.analysis.reliability import bif_reliability
    from basinscope.analysis.susceptibilities import compute_susceptibilities
    from basinscope.api import bif, llc, plan, susceptibilities
    from basinscope.attribution.harvest import harvest_attributions
    from basinscope.extraction import extract_dataset
    from basinscope.io.activation_store import open_activations
    from basinscope.io.attributions_merge import merge_attributions
    from basinscope.io.store import open_store
    from basinscope.io.verify import verify
    from basinscope.lens import LogitLens
    from basinscope.models.activation_cache import ActivationCache
    from basinscope.models.extraction import ExtractionConfig, extract
    from basinscope.models.interventions import Intervention, intervened
    from basinscope.models.preview import preview_weight_restriction
    from basinscope.models.restrictions import all_heads, all_layers, create_param_masks
    from basinscope.sampling.check import check_model
    from basinscope.sampling.optimizer import SGLD
    from basinscope.sampling.sample import sample
    from basinscope.sampling.temperature import default_nbeta
    from basinscope.sampling.tokenize import tokenize_and_concatenate, tokenize_texts

_HOME = {
    "sample": "basinscope.sampling.sample",
    "llc": "basinscope.api",
    "bif": "basinscope.api",
    "susceptibilities": "basinscope.api",
    "plan": "basinscope.api",
    "compute_llc": "basinscope.analysis.llc",
    "compare_llc": "basinscope.analysis.comparison",
    "compute_bif": "basinscope.analysis.bif",
    "bif_reliability": "basinscope.analysis.reliability",
    "bif_chance": "basinscope.analysis.chance",
    "compute_susceptibilities": "basinscope.analysis.susceptibilities",
    "create_param_masks": "basinscope.models.restrictions",
    "all_heads": "basinscope.models.restrictions",
    "all_layers": "basinscope.models.restrictions",
    "preview_weight_restriction": "basinscope.models.preview",
    "check_model": "basinscope.sampling.check",
    "SGLD": "basinscope.sampling.optimizer",
    "open_store": "basinscope.io.store",
    "verify": "basinscope.io.verify",
    "tokenize_and_concatenate": "basinscope.sampling.tokenize",
    "tokenize_texts": "basinscope.sampling.tokenize",
    "default_nbeta": "basinscope.sampling.temperature",
    "extract": "basinscope.models.extraction",
    "ExtractionConfig": "basinscope.models.extraction",
    "ActivationCache": "basinscope.models.activation_cache",
    "Intervention": "basinscope.models.interventions",
    "intervened": "basinscope.models.interventions",
    "extract_dataset": "basinscope.extraction",
    "open_activations": "basinscope.io.activation_store",
    "ActivationSaver": "basinscope.activations",
    "ActivationLoader": "basinscope.activations",
    "LogitLens": "basinscope.lens",
    "harvest_attributions": "basinscope.attribution.harvest",
    "AttributionStore": "basinscope.analysis.attribution",
    "merge_attributions": "basinscope.io.attributions_merge",
}

__all__ = [
    "SGLD",
    "ActivationCache",
    "ActivationLoader",
    "ActivationSaver",
    "AttributionStore",
    "ExtractionConfig",
    "Intervention",
    "LogitLens",
    "__version__",
    "all_heads",
    "all_layers",
    "bif",
    "bif_chance",
    "bif_reliability",
    "check_model",
    "compare_llc",
    "compute_bif",
    "compute_llc",
    "compute_susceptibilities",
    "create_param_masks",
    "default_nbeta",
    "extract",
    "extract_dataset",
    "harvest_attributions",
    "intervened",
    "llc",
    "merge_attributions",
    "open_activations",
    "open_store",
    "plan",
    "preview_weight_restriction",
    "sample",
    "susceptibilities",
    "tokenize_and_concatenate",
    "tokenize_texts",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'basinscope' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        from basinscope.report.console import explain_missing

        raise ModuleNotFoundError(explain_missing(error), name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
