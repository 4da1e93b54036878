"""A sampling store as one HTML file: its LLC, its chains, where tokens move."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import xarray as xr

from basinscope.analysis.llc import compute_llc
from basinscope.report.figures import loss_traces, observables_of, running_llc, token_loss_shift
from basinscope.report.page import image, require_new, section, table, write_page
from basinscope.report.tables import (
    error_text,
    llc_error,
    llc_notes,
    observables_notes,
    observables_rows,
)


def samples_page(
    tree: xr.DataTree, path: str | os.PathLike[str], name: str, *, burn_in: int = 0
) -> Path:
    """Write a page about a store of :func:`basinscope.sample`.

    Parameters
    ----------
    tree : xr.DataTree
        The store, opened.
    path : path
        The ``.html`` file.
    name : str
        What the store is called.
    burn_in : int
        Steps to leave out at the start of every chain.

    Raises
    ------
    FileExistsError
        If there is something at ``path``.
    """
    require_new(path)
    llc = compute_llc(tree, burn_in=burn_in).compute()
    numbers = [
        ("all chains", f"{float(llc['llc_mean']):.3f} ± {error_text(llc_error(llc), 3)}"),
        *(
            (f"chain {chain}", f"{value:.3f}")
            for chain, value in zip(
                llc["chain"].to_numpy().tolist(), llc["llc_per_chain"].to_numpy(), strict=True
            )
        ),
    ]
    sections = [
        section(
            "Local learning coefficient",
            table("± is the standard error", numbers)
            + _on_observables(llc)
            + _paragraphs([*llc_notes(llc), *observables_notes(llc)])
            + image(running_llc(llc), "the estimate over the steps"),
        ),
        section("Losses of the chains", image(loss_traces(llc), "loss over the steps")),
    ]
    if observables_of(tree):
        shift = image(token_loss_shift(tree, burn_in=burn_in), "shift of each token's loss")
        sections.append(section("Where single tokens move", shift))
    return write_page(path, "Samples around a checkpoint", _facts(tree, name), sections)


def _on_observables(llc: xr.Dataset) -> str:
    head = ("observable", "against the loss at the", "LLC")
    rows = [(name, reference, value) for name, value, reference in observables_rows(llc)]
    return table("On observables", rows, head) if rows else ""


def _paragraphs(texts: list[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _facts(tree: xr.DataTree, name: str) -> dict[str, object]:
    config = tree.attrs.get("metadata", {}).get("config", {})
    settings = config.get("sampler", {})
    shown = ("lr", "n_beta", "localization", "num_chains", "num_draws",
             "num_burnin_steps", "batch_size")  # fmt: skip
    facts: dict[str, object] = {"store": name}
    if model := config.get("model"):
        facts["model"] = f"{model['class']}, {model['parameters']:,} parameters"
    facts["settings"] = ", ".join(f"{key} {settings[key]}" for key in shown if key in settings)
    facts["written by"] = tree.attrs.get("created_by", "devinterp")
    return facts
