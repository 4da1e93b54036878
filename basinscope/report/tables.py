"""Tables of stores and estimates, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from rich.table import Table

from basinscope.io.store import DONE, FAILED, PENDING, RUNNING

COLOURS = {DONE: "green", FAILED: "red", PENDING: "dim", RUNNING: "cyan", "interrupted": "yellow"}


def llc_table(llc: xr.Dataset, diagnostics: xr.Dataset | None = None) -> Table:
    """Show the LLC of each chain and over all of them.

    Parameters
    ----------
    llc : xr.Dataset
        Of :func:`basinscope.compute_llc`, computed.
    diagnostics : xr.Dataset, optional
        Of :func:`basinscope.analysis.diagnostics.chain_diagnostics`; its Monte-Carlo standard
        error of the mean loss, times nβ, is the uncertainty of the LLC. Without it the
        uncertainty is the spread of the chains over the root of their number.
    """
    table = Table(title="Local learning coefficient (LLC)", title_justify="left", show_edge=False)
    for heading in ("chain", "mean loss (nats)", "rise (nats)", "LLC"):
        table.add_column(heading, justify="right")
    initial = float(llc["init_loss"])
    means = llc["loss_trace"].mean([llc["loss_trace"].dims[1]])
    for chain, loss, value in zip(
        llc["chain"].values, means.values, llc["llc_per_chain"].values, strict=True
    ):
        table.add_row(f"{chain}", f"{loss:.4f}", f"{loss - initial:+.4f}", f"{value:.2f}")
    table.add_section()
    error = f"[bold]{float(llc['llc_mean']):.2f}[/] ± {llc_error(llc, diagnostics):.2f}"
    overall = float(means.mean())
    table.add_row("all", f"{overall:.4f}", f"{overall - initial:+.4f}", error)
    return table


def llc_error(llc: xr.Dataset, diagnostics: xr.Dataset | None = None) -> float:
    """Give the standard error of ``llc_mean``; see :func:`llc_table`."""
    if diagnostics is not None:
        return float(llc["n_beta"] * diagnostics["mcse_mean"])
    values = llc["llc_per_chain"].to_numpy()
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def arrays_table(path: Path) -> Table:
    """Show the arrays of a store with their sizes in memory and on disk."""
    table = Table(title="Arrays", title_justify="left", show_edge=False)
    for heading in ("name", "shape", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in ("raw", "on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    raw_total = disk_total = 0
    for name, array in sorted(zarr.open_group(path, mode="r").arrays()):
        disk = _bytes_on_disk(path / name)
        raw_total, disk_total = raw_total + array.nbytes, disk_total + disk
        shape = " × ".join(map(str, array.shape)) or "scalar"
        table.add_row(name, shape, str(array.dtype), human_bytes(array.nbytes), human_bytes(disk))
    table.add_section()
    share = f"all ({disk_total / raw_total:.0%} of raw)" if raw_total else "all"
    table.add_row(share, "", "", human_bytes(raw_total), human_bytes(disk_total))
    return table


def chains_table(records: Mapping[int, Mapping[str, Any]], running: set[int]) -> Table:
    """Show the state of each chain.

    Parameters
    ----------
    records : mapping
        Of :meth:`basinscope.io.store.SampleStore.records`.
    running : set of int
        Chains that some process holds now; others whose record says so were interrupted.
    """
    table = Table(title="Chains", title_justify="left", show_edge=False)
    for heading, side in (
        ("chain", "right"), ("state", "left"), ("draws", "right"), ("steps", "right"),
        ("seconds", "right"), ("device", "left"), ("note", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for chain, record in records.items():
        state = record["state"]
        if state == RUNNING and chain not in running:
            state = "interrupted"
        note = ""
        if state == FAILED:
            note = f"step {record['failed_step']}: {record['reason']}"
        elif state == "interrupted":
            note = "the same call continues it"
        spent = sum(s for phase, s in record["seconds"].items() if "background" not in phase)
        table.add_row(
            str(chain),
            f"[{COLOURS[state]}]{state}[/]",
            str(record["draws_written"]),
            str(record["steps_written"]),
            f"{spent:.1f}" if spent else "-",
            str(record.get("device", "-")),
            note,
        )
    return table


def phases_table(seconds: Mapping[str, float]) -> Table:
    """Show where the time of a run went."""
    table = Table(title="Time", title_justify="left", show_edge=False)
    for heading, side in (("phase", "left"), ("seconds", "right"), ("share", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    foreground = {p: s for p, s in seconds.items() if "background" not in p}
    total = sum(foreground.values())
    for phase, spent in seconds.items():
        share = f"{spent / total:.1%}" if phase in foreground and total else ""
        table.add_row(phase, f"{spent:.2f}", share)
    table.add_section()
    table.add_row("all", f"{total:.2f}", "")
    return table


def human_bytes(count: float) -> str:
    """Write a number of bytes with a unit.

    Examples
    --------
    >>> human_bytes(512), human_bytes(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
