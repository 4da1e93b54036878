"""Tables of stores and estimates, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from rich.markup import escape
from rich.table import Table

from basinscope.analysis.plan import Plan
from basinscope.analysis.rise import drift_of, error_of_mean
from basinscope.analysis.selections import planned_rows
from basinscope.io import dims
from basinscope.io.store import DONE, FAILED, PENDING, RUNNING, sampler_settings
from basinscope.report.words import Words, quoted

COLOURS = {DONE: "green", FAILED: "red", PENDING: "dim", RUNNING: "cyan", "interrupted": "yellow"}

OBSERVABLES = (
    "On an observable: nβ times the rise of its loss along chains that follow the sampling data "
    "alone; it measures no basin of the observable's own, and may be negative."
)
NO_MINIMUM = (
    "A negative LLC says that chains went down from the checkpoint: the loss has no minimum there, "
    "and how sharp one is cannot be told. Train longer, or localize more."
)
SURELY = 3.0  # standard errors
BY_CHANCE = "by_chance"
OF_CHANCE = ("reliability", "noise", BY_CHANCE)
FIRST_DRAW = "first draw"  # an LLC's attribute "reference"; the other one is "checkpoint"
FIRST_DRAW_CAVEAT = (
    "Against the first draw, where the store has no loss of the observable at the checkpoint: what "
    "the loss rose before that draw is left out, so the figure is usually too low."
)


def llc_table(llc: xr.Dataset) -> Table:
    """Show the LLC of each chain and over all of them.

    Parameters
    ----------
    llc : xr.Dataset
        Of :func:`basinscope.compute_llc`, computed.
    """
    table = Table(title="Local learning coefficient (LLC)", title_justify="left", show_edge=False)
    for heading in ("chain", "mean loss (nats)", "rise (nats)", "LLC"):
        table.add_column(heading, justify="right")
    initial = float(llc["init_loss"])
    rises = llc["llc_per_chain"] / llc["n_beta"]
    for chain, rise, value in zip(
        llc["chain"].values, rises.values, llc["llc_per_chain"].values, strict=True
    ):
        table.add_row(f"{chain}", f"{initial + rise:.4f}", f"{rise:+.4f}", f"{value:.2f}")
    table.add_section()
    figure = f"[bold]{float(llc['llc_mean']):.2f}[/] ± {error_text(llc_error(llc), 2)}"
    overall = float(rises.mean())
    table.add_row("all", f"{initial + overall:.4f}", f"{overall:+.4f}", figure)
    return table


def error_text(error: float, digits: int) -> str:
    """Write a standard error; where it is NaN, with the reason."""
    return f"{error:.{digits}f}" + (" (too few steps)" if np.isnan(error) else "")


def llc_notes(llc: xr.Dataset) -> list[str]:
    """Say in plain sentences how far an LLC can be trusted, and which steps it counts.

    Parameters
    ----------
    llc : xr.Dataset
        As for :func:`llc_table`.
    """
    drift, error = llc_drift(llc)
    return [
        f"R-hat {float(llc['rhat']):.3f}, effective sample size {float(llc['ess_bulk']):.0f} of "
        f"{llc['loss_trace'].size} {llc['loss_trace'].dims[1]}s, drift {drift:+.2f} ± {error:.2f}.",
        "± is the standard error. An R-hat below 1.01 says that the chains agree; a drift (second "
        "half minus first) far beyond its error, that they have not arrived. Fewer than about 100 "
        "effective samples are too few to judge.",
        *_note_of_sign(llc),
        *_note_of_start(llc),
        *_note_of_settling(llc),
        *_note_of_burn_in(llc),
    ]


def _note_of_sign(llc: xr.Dataset) -> list[str]:
    return [NO_MINIMUM] if is_below_zero(float(llc["llc_mean"]), llc_error(llc)) else []


def is_below_zero(value: float, error: float) -> bool:
    """Whether an LLC is negative, far beyond its standard error."""
    return value < -SURELY * error


def _note_of_start(llc: xr.Dataset) -> list[str]:
    """Say where most of the error is the checkpoint's, which more batches cure."""
    settings = sampler_settings(llc.attrs)
    steps = planned_rows(llc, dims.STEP, unknown=0)
    batches = int(settings.get("num_init_loss_batches", steps))
    of_traces = float(llc["n_beta"]) * error_of_mean(*_traces(llc))
    if batches >= steps or not llc_error(llc) > 1.5 * of_traces:
        return []
    return [
        f"Most of ± is the noise of the loss at the checkpoint, from the batches of {batches:,} "
        f"steps: num_init_loss_batches={steps} would take it on all that the chains see."
    ]


def _note_of_settling(llc: xr.Dataset) -> list[str]:
    """Say where a chain has too few steps to arrive, which its own traces need not show.

    Where the loss is flat, a chain of plain SGLD forgets its start in 2 / (ε γ) steps.
    """
    settings = sampler_settings(llc.attrs)
    pull = float(settings.get("lr", 0)) * float(settings.get("localization", 0))
    if not pull or "num_draws" not in settings or settings.get("sampling_method") != "sgmcmc_sgld":
        return []
    steps = planned_rows(llc, dims.STEP, unknown=0)
    settling = 2 / pull
    if steps >= settling:
        return []
    return [
        f"Where the loss is flat, chains take about 2 / (lr * localization) = {settling:,.0f} "
        f"steps to forget their start, and these have {steps:,}: the LLC is likely too low, "
        "whatever R-hat and drift say. Raise lr, or take more steps."
    ]


def _note_of_burn_in(llc: xr.Dataset) -> list[str]:
    row = llc["loss_trace"].dims[1]
    numbers = llc[row].to_numpy()
    burn_in = int(sampler_settings(llc.attrs).get("num_burnin_steps", 0)) if row == dims.STEP else 0
    if counted := np.count_nonzero(numbers < burn_in):
        return [
            f"Counts {counted} burn-in steps of each chain; --burn-in {burn_in} leaves them out."
        ]
    return [f"Leaves out the first {numbers[0]} {row}s of each chain."] if numbers[0] else []


def llc_drift(llc: xr.Dataset) -> tuple[float, float]:
    """Give the LLC of the second half of the steps minus that of the first, and its standard error.

    See :func:`basinscope.analysis.rise.drift_of`.
    """
    n_beta, (drift, error) = float(llc["n_beta"]), drift_of(*_traces(llc))
    return n_beta * drift, n_beta * error


def _traces(llc: xr.Dataset) -> tuple[list[np.ndarray], bool]:
    """Give the chains' loss traces, and whether they saw the same batches."""
    shared = sampler_settings(llc.attrs).get("match_sampling_input_ids_across_chains", True)
    traces = llc["loss_trace"].transpose("chain", ...).to_numpy()
    return [trace[np.isfinite(trace)] for trace in traces], bool(shared)


def llc_figures(llc: xr.Dataset) -> dict[str, object]:
    """Give the figures of an LLC that fit on a line, for JSON."""
    scalars = ("llc_mean", "llc_std", "llc_scalar", "init_loss", "n_beta", "rhat", "ess_bulk")
    drift, drift_error = llc_drift(llc)
    return {
        **{name: float(llc[name]) for name in scalars},
        "llc_error": llc_error(llc),
        "llc_drift": drift,
        "llc_drift_error": drift_error,
        "llc_per_chain": llc["llc_per_chain"].to_numpy().tolist(),
        "llc_observables": {name: float(value) for name, value in _on_observables(llc).items()},
        "llc_observables_error": {
            name: float(llc[f"{value.name}_mcse"]) for name, value in _on_observables(llc).items()
        },
        "llc_observables_reference": {
            name: value.attrs["reference"] for name, value in _on_observables(llc).items()
        },
    }


def observables_table(llc: xr.Dataset) -> Table | None:
    """Show the LLC on each observable, and what it is taken against; None if there is none.

    Parameters
    ----------
    llc : xr.Dataset
        As for :func:`llc_table`.
    """
    rows = observables_rows(llc)
    if not rows:
        return None
    table = Table(title="LLC on observables", title_justify="left", show_edge=False)
    table.add_column("observable")
    table.add_column("LLC", justify="right")
    table.add_column("against the loss at the")
    for name, value, reference in rows:
        table.add_row(escape(name), value, reference)
    return table


def observables_rows(llc: xr.Dataset) -> list[tuple[str, str, str]]:
    """Give the name of each observable, its LLC with the error, and what that is taken against."""
    return [
        (name, _with_error(value, llc[f"{value.name}_mcse"]), value.attrs["reference"])
        for name, value in _on_observables(llc).items()
    ]


def _with_error(value: xr.DataArray, error: xr.DataArray) -> str:
    return f"{float(value):.2f} ± {error_text(float(error), 2)}"


def observables_notes(llc: xr.Dataset) -> list[str]:
    """Say what the LLC on observables is; nothing if there is none."""
    caveats = [FIRST_DRAW_CAVEAT] if against_first_draw(llc) else []
    return [OBSERVABLES, *caveats] if _on_observables(llc) else []


def against_first_draw(llc: xr.Dataset) -> list[str]:
    """Name the observables whose LLC is taken against their first draw."""
    found = _on_observables(llc)
    return [name for name, value in found.items() if value.attrs["reference"] == FIRST_DRAW]


def _on_observables(llc: xr.Dataset) -> dict[str, xr.DataArray]:
    return {
        str(name).removeprefix("llc_"): value
        for name, value in llc.data_vars.items()
        if "reference" in value.attrs
    }


def llc_error(llc: xr.Dataset) -> float:
    """Give the standard error of ``llc_mean``; NaN where there are too few steps for one.

    The Monte Carlo error; for chains too short for one, the spread of the chains over the root of
    their number, if each saw batches of its own. Those that share batches share their noise.
    """
    error = float(llc["llc_mcse"])
    values = llc["llc_per_chain"].to_numpy()
    shared = sampler_settings(llc.attrs).get("match_sampling_input_ids_across_chains", True)
    if np.isnan(error) and len(values) > 1 and not shared:
        return float(values.std(ddof=1) / np.sqrt(len(values)))
    return error


def plan_table(name: str, plan: Plan) -> Table:
    """Show what an analysis would cost."""
    table = Table(title=f"{plan.estimator} of {name}", title_justify="left", show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("planned", justify="right")
    for heading, figure in plan.rows():
        table.add_row(heading, figure)
    return table


def agreement_table(found: xr.Dataset) -> Table:
    """Show how far single chains agree about influences.

    Parameters
    ----------
    found : xr.Dataset
        Of :func:`basinscope.bif_reliability`, computed.
    """
    table = Table(title="Agreement of chains", title_justify="left", show_edge=False)
    table.add_column("chain")
    for chain in found["chain"].values:
        table.add_column(str(chain), justify="right")
    for chain, row in zip(found["chain"].values, found["agreement"].values, strict=True):
        table.add_row(str(chain), *(f"{value:.3f}" for value in row))
    return table


def reliability_note(found: xr.Dataset) -> str:
    """Say in a sentence what a reliability is; parameters as :func:`agreement_table`."""
    alpha, chains = float(found["reliability"]), found.sizes["chain"]
    if np.isnan(alpha):
        few = "two chains do not tell it, three or more do"
        if chains > 2:
            few = "losses are constant, or there is one pair of sequences"
        return f"Reliability: {few}."
    twice = f", and twice as many have {2 * alpha / (1 + alpha):.2f}" if alpha > 0 else ""
    return (
        f"Reliability {alpha:.2f}: influences between different sequences from {chains} other "
        f"chains would correlate with these by about that{twice}."
    )


def influence_pairs(bif: xr.Dataset, count: int) -> list[dict[str, Any]]:
    """Find the pairs of different sequences with the strongest influence on each other.

    Parameters
    ----------
    bif : xr.Dataset
        Of :func:`basinscope.compute_bif`, between sequences, computed.
    count : int
        Pairs.
    """
    values = bif["influences"].to_numpy().astype(float)
    rows, columns = bif["batch_1"].to_numpy(), bif["batch_2"].to_numpy()
    strength = np.where(np.isnan(values), -1, np.abs(values))
    strength[rows[:, None] == columns[None, :]] = -1  # itself
    again = np.isin(rows, columns)[:, None] & np.isin(columns, rows)[None, :]
    strength[again & (rows[:, None] > columns[None, :])] = -1  # the same pair, mirrored
    order = np.argsort(strength, axis=None)[::-1][:count]
    return [
        {
            "observable_1": _observable_of(bif, rows[i]),
            "batch_1": int(rows[i]),
            "observable_2": _observable_of(bif, columns[j]),
            "batch_2": int(columns[j]),
            "influence": float(values[i, j]),
        }
        for i, j in zip(*np.unravel_index(order, strength.shape), strict=True)
        if strength[i, j] >= 0
    ]


def influence_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """Show pairs of sequences; see :func:`influence_pairs`."""
    table = Table(title="Strongest pairs of sequences", title_justify="left", show_edge=False)
    for heading in ("sequence", "sequence", "influence"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        sides = (f"{escape(pair[f'observable_{n}'])} {pair[f'batch_{n}']}" for n in (1, 2))
        table.add_row(*sides, f"{pair['influence']:+.4f}")
    return table


def partner_figures(bif: xr.Dataset, words: Words | None = None) -> dict[str, Any]:
    """Give every query with its partners, as lists (query,) and (sign, query, rank).

    Parameters
    ----------
    bif : xr.Dataset
        Of :func:`basinscope.compute_bif` with ``top_k``, computed; with the variables of
        :func:`basinscope.bif_chance` for the same queries, these too.
    words : function of int to str, optional
        Adds the text of their tokens.
    """
    figures: dict[str, Any] = {"observables": bif.attrs["observables"]}
    figures |= {name: bif[name].to_numpy().tolist() for name in OF_CHANCE if name in bif}
    for kind, also in (("query", ()), ("partner", ("influences",))):
        places = (f"{kind}_batch", f"{kind}_target_position")
        figures |= {name: bif[name].to_numpy().tolist() for name in (*places, *also)}
        if words is not None:
            batch, position = (bif[name].to_numpy() for name in places)
            tokens = bif["input_ids"].to_numpy()[batch, position]
            texts = [
                words(t) if b >= 0 else None for t, b in zip(tokens.flat, batch.flat, strict=True)
            ]
            figures[f"{kind}_token"] = np.reshape(np.array(texts, object), batch.shape).tolist()
    return figures


def numbering(bif: xr.Dataset) -> str:
    """Say which sequences are whose, as in "0 to 15 code, 16 to 31 prose"."""
    owned = _sequences_of(bif).items()
    return ", ".join(f"{own.start} to {own.stop - 1} {name}" for name, own in owned)


def _observable_of(bif: xr.Dataset, sequence: int) -> str:
    """Name the observable that a sequence, numbered over all of them, is of."""
    return next(name for name, own in _sequences_of(bif).items() if int(sequence) in own)


def _sequences_of(bif: xr.Dataset) -> dict[str, range]:
    """Number the sequences of each observable."""
    counts = bif.attrs["observables"]
    ends = accumulate(counts.values())
    return {
        name: range(end - count, end)
        for (name, count), end in zip(counts.items(), ends, strict=True)
    }


def partner_table(
    bif: xr.Dataset, queries: int, partners: int, words: Words | None = None
) -> Table:
    """Show the strongest partners of the first queries, as sequence:position.

    Parameters
    ----------
    bif : xr.Dataset
        Of :func:`basinscope.compute_bif` with ``top_k``, computed; with the variables of
        :func:`basinscope.bif_chance` for the same queries, what is reached by chance too.
    queries, partners : int
        How many at most; partners of each sign.
    words : function of int to str, optional
        Shows the tokens whose losses these are, too.
    """

    def named(batch: int, position: int) -> str:
        text = f"{batch}:{position}"
        if words is None:
            return text
        token = int(bif["input_ids"][batch, position])
        return f"{text} {escape(quoted(words(token)))}"

    total = bif.sizes["query"]
    shown = min(queries, total)
    title = f"Strongest partners of {shown} of {total} query tokens (sequence:position)"
    table = Table(title=title, title_justify="left", show_edge=False, show_lines=True)
    table.add_column("query", no_wrap=True)
    for sign in bif["sign"].values:
        table.add_column(str(sign))
    if BY_CHANCE in bif:
        table.add_column("by chance", justify="right")
    for query in range(shown):
        one = bif.isel(query=query)
        cells = []
        for sign in range(one.sizes["sign"]):
            found = one.isel(sign=sign, rank=slice(partners))
            lines = [
                f"{value:+.3f}  {named(batch, position)}"
                for batch, position, value in zip(
                    found["partner_batch"].values,
                    found["partner_target_position"].values,
                    found["influences"].values,
                    strict=True,
                )
                if batch >= 0
            ]
            cells.append("\n".join(lines) or "-")
        if BY_CHANCE in bif:
            reached = float(one[BY_CHANCE])
            cells.append("-" if np.isnan(reached) else f"±{reached:.3f}")
        at = named(int(one["query_batch"]), int(one["query_target_position"]))
        table.add_row(at, *cells)
    return table


def chance_note(bif: xr.Dataset) -> str:
    """Say in a sentence what "by chance" is; empty if it is not known.

    Parameters
    ----------
    bif : xr.Dataset
        As for :func:`partner_table`.
    """
    if BY_CHANCE not in bif:
        return ""
    return "By chance: what the strongest of as many unrelated tokens reaches."


def susceptibility_figures(sus: xr.DataTree) -> list[dict[str, object]]:
    """Summarise susceptibilities over the tokens of each observable.

    "error" is the root mean square of the tokens' standard errors.

    Parameters
    ----------
    sus : xr.DataTree
        Of :func:`basinscope.compute_susceptibilities`, computed.
    """
    flat = sus["susceptibilities"].to_dataset()
    datasets = flat["dataset_id"].to_numpy()
    return [
        {
            "restriction": str(restriction),
            "observable": observable,
            "mean": float(values.mean()),
            "std": float(values.std()),
            "min": float(values.min()),
            "max": float(values.max()),
            "error": float(np.sqrt(np.square(errors).mean())),
        }
        for column, restriction in enumerate(flat["wr"].to_numpy())
        for dataset, observable in enumerate(flat.attrs["dataset_id_to_name"])
        for values, errors in [
            [flat[name].to_numpy()[datasets == dataset, column] for name in ("sus", "sus_mcse")]
        ]
    ]


def susceptibility_table(figures: Sequence[Mapping[str, object]]) -> Table:
    """Show what :func:`susceptibility_figures` found."""
    table = Table(title="Susceptibilities of tokens (nats²)", title_justify="left", show_edge=False)
    table.add_column("part")
    table.add_column("observable")
    for heading in ("mean", "std", "min", "max", "± each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures:
        numbers = [f"{row[name]:+.2e}" for name in ("mean", "std", "min", "max")]
        numbers.append("-" if np.isnan(error := float(str(row["error"]))) else f"{error:.2e}")
        table.add_row(str(row["restriction"]), str(row["observable"]), *numbers)
    return table


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
