"""A sampling store as one HTML file: its LLC, its chains, where tokens move."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from basinscope.analysis.llc import compute_llc
from basinscope.report.figures import loss_traces, observables_of, running_llc, token_loss_shift
from basinscope.report.page import image, require_new, section, table, write_page
from basinscope.report.tables import llc_figures


def samples_page(tree: xr.DataTree, path: str | os.PathLike[str], name: str) -> Path:
    """Write a page about a store of :func:`basinscope.sample`.

    Parameters
    ----------
    tree : xr.DataTree
        The store, opened.
    path : path
        The ``.html`` file.
    name : str
        What the store is called.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    """
    require_new(path)
    llc = compute_llc(tree).compute()
    figures = llc_figures(llc)
    numbers = [
        ("all chains", f"{figures['llc_mean']:.3f} ± {figures['llc_error']:.3f}"),
        *(
            (f"chain {chain}", f"{value:.3f}")
            for chain, value in zip(
                llc["chain"].to_numpy().tolist(), llc["llc_per_chain"].to_numpy(), strict=True
            )
        ),
    ]
    quality = f"R-hat {figures['rhat']:.3f}, effective sample size {figures['ess_bulk']:.0f}"
    sections = [
        section(
            "Local learning coefficient",
            table("± is the standard error", numbers)
            + f"<p>{quality}. Trust the error once R-hat is below 1.01.</p>"
            + image(running_llc(llc), "the estimate over the steps"),
        ),
        section("Losses of the chains", image(loss_traces(llc), "loss over the steps")),
    ]
    if observables_of(tree):
        shift = image(token_loss_shift(tree), "shift of each token's loss")
        sections.append(section("Where single tokens move", shift))
    return write_page(path, "Samples around a checkpoint", _facts(tree, name), sections)


def _facts(tree: xr.DataTree, name: str) -> dict[str, object]:
    config = tree.attrs.get("metadata", {}).get("config", {})
    settings = config.get("sampler", {})
    shown = ("lr", "n_beta", "localization", "num_chains", "num_draws", "batch_size")
    facts: dict[str, object] = {"store": name}
    if model := config.get("model"):
        facts["model"] = f"{model['class']}, {model['parameters']:,} parameters"
    facts["settings"] = ", ".join(f"{key} {settings[key]}" for key in shown if key in settings)
    facts["written by"] = tree.attrs.get("created_by", "devinterp")
    return facts
