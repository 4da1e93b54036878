"""Commands that analyse stores: ``basinscope llc | bif | reliability | susceptibilities``."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from basinscope.report.console import (
    err,
    out,
    print_json,
    readable_errors,
    require_one_of,
    short_warnings,
)
from basinscope.sampling.numbers import GRAMMAR, parse_numbers

if TYPE_CHECKING:
    import xarray as xr

    from basinscope.analysis.plan import Plan

Stores = Annotated[list[Path], typer.Argument(help="Sampling stores (.zarr directories).")]
Output = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the result to this Zarr store.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be read, held and computed; do nothing.")
]
Incomplete = Annotated[
    bool, typer.Option("--allow-incomplete", help="Take what running or stopped stores have.")
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Such as 4GiB. Default: half of the free memory.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Tasks at once; with --scheduler, threads of a worker. Default: one for each core."
    ),
]
Scheduler = Annotated[
    str | None, typer.Option(help="Address of a Dask cluster to run on, tcp://host:port.")
]
Profile = Annotated[
    Path | None, typer.Option(help="Write Dask's profile and a summary to this directory.")
]


def llc(
    stores: Stores,
    output: Output = None,
    burn_in: Annotated[int, typer.Option(help="Steps to leave out of every chain.")] = 0,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    allow_incomplete: Incomplete = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    profile: Profile = None,
) -> None:
    """Estimate the local learning coefficient of stores, with its uncertainty."""
    with readable_errors(), short_warnings(), _running_on(threads, scheduler):
        import xarray as xr

        from basinscope.analysis.llc import compute_llc, identity_of_losses, plan_of_llc
        from basinscope.io.results import require_free
        from basinscope.report.tables import llc_figures

        refuse_other_kinds(*stores)
        if output is not None or profile is not None:
            _require_distinct(stores)
        options: dict[str, Any] = {"burn_in": burn_in, "allow_incomplete": allow_incomplete}
        if dry_run:
            plans = {str(s): plan_of_llc(s, **options) for s in stores}
            _show_plans(plans, as_json, memory_limit)
            return
        settings: dict[str, Any] = {"llc": options}
        if output is not None:
            settings["stores"] = {
                str(store): identity_of_losses(store, allow_incomplete) for store in stores
            }
            require_free(output, settings)
        found: list[dict[str, Any]] = []
        estimates: dict[str, xr.Dataset] = {}
        for store in stores:
            lazy = compute_llc(store, memory_limit=memory_limit, **options)
            at = None if profile is None else profile / store.stem if len(stores) > 1 else profile
            plan = partial(plan_of_llc, store, **options)
            estimate = _computed(lazy.compute, plan, at)
            estimates[store.stem] = estimate
            found.append({"store": str(store), **llc_figures(estimate)})
            if not as_json:
                if len(stores) > 1:
                    out.print(f"[bold]{escape(str(store))}[/]")
                _show_llc(estimate)
        if output is not None:
            _write(
                xr.DataTree(estimates[stores[0].stem])
                if len(stores) == 1
                else xr.DataTree.from_dict(estimates),
                output,
                settings,
                as_json,
            )
        if as_json:
            print_json(found[0] if len(found) == 1 else found)


def bif(
    store: Annotated[Path, typer.Argument(help="A sampling store (a .zarr directory).")],
    output: Output = None,
    method: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    chains: Annotated[str, typer.Option(help="stack them, or take their mean.")] = "stack",
    observable: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again. Default: all.")
    ] = None,
    rows_1: Annotated[str, typer.Option(help=f"Sequences on the left: {GRAMMAR}.")] = "all",
    rows_2: Annotated[str, typer.Option(help=f"Sequences on the right: {GRAMMAR}.")] = "all",
    average: Annotated[bool, typer.Option("--average", help="Average over both tokens.")] = False,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Covariance instead of correlation.")
    ] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Only the strongest partners of each query token.")
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(
            help="A query token as SEQUENCE:POSITION, sequences counted from 0 and positions "
            "from 1; may be given again."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder, tokenizer.json or name, for the text of tokens with --top-k."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="An HTML file of the partners in their text, with --top-k.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda: products on the GPU.")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    allow_incomplete: Incomplete = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    profile: Profile = None,
) -> None:
    """Correlate the losses of tokens or sequences over the draws.

    Influence between all tokens is large: write it with --out, ask for the strongest partners with
    --top-k, or for the mean over tokens with --average.
    """
    with readable_errors(), short_warnings(), _running_on(threads, scheduler):
        from basinscope.analysis.bif import compute_bif, plan_bif
        from basinscope.report import tables
        from basinscope.report.influence_page import influence_page
        from basinscope.report.page import require_new
        from basinscope.sampling.loading import load_words

        require_one_of("--method", method, ("token", "sequence"))
        require_one_of("--chains", chains, ("stack", "mean"))
        if top_k is not None and (method != "token" or average):
            raise ValueError("--top-k goes neither with --method sequence nor with --average")
        if query and top_k is None:
            raise ValueError("--query asks for the strongest partners of tokens: give --top-k too")
        for option, value in (("--tokenizer", tokenizer), ("--page", page)):
            if value is not None and top_k is None:
                raise ValueError(f"{option} shows the tokens of --top-k: give --top-k too")
        if page is not None:
            require_new(page)
        if (device or "").startswith("cuda"):
            import torch  # noqa: F401
        refuse_other_kinds(store)
        words = None if tokenizer is None else load_words(tokenizer)
        options: dict[str, Any] = {
            "correlation_method": method,
            "reduce_chain_dimension_method": chains,
            "loss_keys": observable or "all",
            "batch_index_range_1": parse_numbers("--rows-1", rows_1),
            "batch_index_range_2": parse_numbers("--rows-2", rows_2),
            "average_tokenwise_bif": average,
            "compute_covariance": covariance,
            "top_k": top_k,
            "queries": [_parse_query(text) for text in query] if query else "all",
            "device": device,
            "allow_incomplete": allow_incomplete,
            "memory_limit": memory_limit,
        }
        plan = partial(plan_bif, store, **options)
        if dry_run:
            _show_plans({str(store): plan()}, as_json, memory_limit)
            return
        between_tokens = method == "token" and not average and top_k is None
        if between_tokens and output is None:
            raise ValueError(
                "influence between all tokens has four dimensions: write it with --out, or ask "
                "for --top-k K or --average"
            )

        def work() -> xr.Dataset:
            found = compute_bif(store, output_path=output, **options)
            if query and chains == "stack":
                found = found.assign(_chance(store, options).data_vars)
            return found if between_tokens else found.compute()

        result = _computed(work, plan, profile)
        if output is not None:
            _say_written(output, as_json)
        if between_tokens:
            if as_json:
                print_json({"output": str(output), "shape": result["influences"].shape})
            return
        if top_k is None:
            pairs = tables.influence_pairs(result, 10)
            if as_json:
                print_json(pairs)
            else:
                out.print(tables.influence_table(pairs))
                out.print(f"Sequences: {tables.numbering(result)}.", highlight=False, markup=False)
            return
        if page is not None:
            facts = {
                "store": store,
                "sequences": tables.numbering(result),
                "influence": result["influences"].attrs["long_name"],
            }
            _say_written(influence_page(page, result, facts, words or "{} ".format), as_json)
        if as_json:
            print_json(tables.partner_figures(result, words))
        else:
            out.print(tables.partner_table(result, 8, 3, words))
            if chance := tables.chance_note(result):
                out.print(chance)
            note = f"Sequences: {tables.numbering(result)}. Positions count from 1."
            out.print(note, highlight=False, markup=False)


def reliability(
    store: Annotated[Path, typer.Argument(help="A sampling store (a .zarr directory).")],
    method: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    observable: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again. Default: all.")
    ] = None,
    rows: Annotated[str, typer.Option(help=f"Sequences: {GRAMMAR}.")] = "all",
    average: Annotated[bool, typer.Option("--average", help="Average over both tokens.")] = False,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Covariance instead of correlation.")
    ] = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    allow_incomplete: Incomplete = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    profile: Profile = None,
) -> None:
    """Say how well influences would come out again, from how well chains agree about them."""
    with readable_errors(), short_warnings(), _running_on(threads, scheduler):
        from basinscope.analysis.reliability import bif_reliability, plan_bif_reliability
        from basinscope.report import tables

        require_one_of("--method", method, ("token", "sequence"))
        refuse_other_kinds(store)
        options: dict[str, Any] = {
            "correlation_method": method,
            "loss_keys": observable or "all",
            "batch_index_range": parse_numbers("--rows", rows),
            "average_tokenwise_bif": average,
            "compute_covariance": covariance,
            "allow_incomplete": allow_incomplete,
            "memory_limit": memory_limit,
        }
        plan = partial(plan_bif_reliability, store, **options)
        if dry_run:
            _show_plans({str(store): plan()}, as_json, memory_limit)
            return
        found = _computed(lambda: bif_reliability(store, **options).compute(), plan, profile)
        if as_json:
            print_json({name: found[name].to_numpy().tolist() for name in found.data_vars})
        else:
            out.print(tables.agreement_table(found))
            out.print(tables.reliability_note(found), highlight=False)


def susceptibilities(
    stores: Annotated[
        list[str],
        typer.Argument(
            help="NAME=STORE for each restriction, full=STORE among them; or stores whose names "
            "end in it, such as s_full.zarr s_l0.zarr."
        ),
    ],
    task: Annotated[str, typer.Option(help="The observable on the data that was sampled on.")],
    output: Output = None,
    observable: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given again.")
    ] = None,
    include_task: Annotated[
        bool, typer.Option("--include-task", help="Ask about the task's tokens too.")
    ] = False,
    baseline: Annotated[
        str,
        typer.Option(
            help="Loss at the checkpoint to count from: of the sampling batches (sampling), or of "
            "the task's own sequences (task)."
        ),
    ] = "sampling",
    as_json: AsJson = False,
    dry_run: DryRun = False,
    allow_incomplete: Incomplete = False,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    profile: Profile = None,
) -> None:
    """Estimate the susceptibility of every token to every weight restriction."""
    with readable_errors(), short_warnings(), _running_on(threads, scheduler):
        from basinscope.analysis.susceptibilities import (
            compute_susceptibilities,
            plan_of_susceptibilities,
        )
        from basinscope.report.tables import susceptibility_figures, susceptibility_table

        require_one_of("--baseline", baseline, ("sampling", "task"))
        restrictions = parse_restrictions(stores)
        refuse_other_kinds(*restrictions.values())
        options: dict[str, Any] = {
            "observable_names": observable or None,
            "include_sampling_task": include_task,
            "baseline": baseline,
            "allow_incomplete": allow_incomplete,
            "memory_limit": memory_limit,
        }
        plan = partial(plan_of_susceptibilities, restrictions, task, **options)
        if dry_run:
            _show_plans({f"{len(restrictions)} stores": plan()}, as_json, memory_limit)
            return

        def work() -> xr.DataTree:
            found = compute_susceptibilities(restrictions, task, output_path=output, **options)
            return found.compute()

        result = _computed(work, plan, profile)
        if output is not None:
            _say_written(output, as_json)
        figures = susceptibility_figures(result)
        print_json(figures) if as_json else out.print(susceptibility_table(figures))


def parse_restrictions(stores: Sequence[str]) -> dict[str, Path]:
    """Give each store the name of its weight restriction.

    Examples
    --------
    >>> sorted(parse_restrictions(["full=a.zarr", "l0=b.zarr"]))
    ['full', 'l0']
    >>> sorted(parse_restrictions(["runs/s_full.zarr", "runs/s_l0h1.zarr"]))
    ['full', 'l0h1']
    """
    pairs = named_stores(stores)
    if pairs is None:
        paths = [Path(text) for text in stores]
        full = [path.stem for path in paths if path.stem.endswith("full")]
        prefix = full[0].removesuffix("full") if len(full) == 1 else None
        if prefix is None or not all(path.stem.startswith(prefix) for path in paths):
            raise ValueError(
                "the restrictions cannot be told from the names of the stores (one must end in "
                "'full', and all begin alike): give them as NAME=STORE"
            )
        pairs = [(path.stem.removeprefix(prefix), path) for path in paths]
    return by_name(pairs, "restriction")


def named_stores(stores: Sequence[str]) -> list[tuple[str, Path]] | None:
    """Read NAME=STORE; None where no store has a name. What is there is a store, "=" or not."""
    named = [("", "", text) if Path(text).exists() else text.partition("=") for text in stores]
    if all(separator for _, separator, _ in named):
        return [(name, Path(path)) for name, _, path in named]
    if any(separator for _, separator, _ in named):
        raise ValueError("give every store as NAME=STORE, or none")
    return None


def by_name(pairs: Sequence[tuple[str, Path]], what: str) -> dict[str, Path]:
    """Refuse names that are given twice."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(
            f"{what} {', '.join(sorted(twice))} is given twice: give other names, NAME=STORE"
        )
    return dict(pairs)


def refuse_other_kinds(*stores: Path) -> None:
    """Say of stores that hold no samples what they are, and what shows them."""
    for store in stores:
        if what := _other_kind(store):
            raise ValueError(f"{store} is {what}")


def _other_kind(store: Path) -> str | None:
    from basinscope.io.activation_index import STORE
    from basinscope.io.activation_layout import KIND
    from basinscope.io.attributions_layout import is_attribution_store
    from basinscope.io.chunked import read_attributes

    attributes = read_attributes(store)
    if attributes.get("kind") == KIND or (store / STORE).is_dir():
        return f"a store of activations: see it with basinscope activations show {store}"
    if is_attribution_store(attributes):
        return (
            f"a store of attributions: see it with basinscope attribute report {store} -o "
            "page.html, or ask it with basinscope attribute top"
        )
    if {"settings", "computed_at"} <= attributes.keys():
        return (
            f"the result of an analysis: open it in Python with xarray.open_datatree('{store}', "
            "engine='zarr', consolidated=False)"
        )
    return None


def _chance(store: Path, options: Mapping[str, Any]) -> xr.Dataset:
    """What queries' influences reach by chance; nothing where there are too few chains to tell."""
    import xarray as xr

    from basinscope.analysis.chance import bif_chance
    from basinscope.analysis.stores import open_samples

    same = ("queries", "loss_keys", "compute_covariance", "allow_incomplete", "memory_limit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search says what is left out
        if len(open_samples(store, options["allow_incomplete"]).chains) < 3:
            return xr.Dataset()
        found = bif_chance(
            store,
            batch_index_range=options["batch_index_range_2"],
            **{name: options[name] for name in same},
        )
    return found.drop_attrs()


def _parse_query(text: str) -> tuple[int, int]:
    sequence, _, position = text.partition(":")
    try:
        return int(sequence), int(position)
    except ValueError:
        raise ValueError(f"--query {text!r}: give SEQUENCE:POSITION, such as 3:17") from None


def _show_llc(estimate: xr.Dataset) -> None:
    from basinscope.report.tables import (
        llc_notes,
        llc_table,
        observables_notes,
        observables_table,
    )

    out.print(llc_table(estimate))
    out.print()
    for note in llc_notes(estimate):
        out.print(note)
    if observables := observables_table(estimate):
        out.print()
        out.print(observables)
    for note in observables_notes(estimate):
        out.print(note)


def _require_distinct(stores: Sequence[Path]) -> None:
    """Refuse stores whose results would have the same name."""
    twice = [name for name, count in Counter(store.stem for store in stores).items() if count > 1]
    if twice:
        raise ValueError(
            f"several stores have the same name, {', '.join(twice)}: with --out and --profile give "
            "them one by one"
        )


@contextmanager
def _running_on(threads: int | None, scheduler: str | None) -> Iterator[None]:
    """Run on so many threads of this process, or on a cluster whose workers have so many."""
    import dask

    from basinscope.analysis.plan import PlanError

    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: give 1 or more")
    with ExitStack() as held:
        if threads is not None:
            held.enter_context(dask.config.set(num_workers=threads))
        if scheduler is not None:
            from distributed import Client

            held.enter_context(Client(scheduler))
        try:
            yield
        except PlanError as error:
            # a cluster has the threads that it has, whatever it is planned for
            fewer = scheduler is None and "num_workers=1" in str(error)
            options = "--memory-limit, --threads 1" if fewer else "--memory-limit"
            raise PlanError(f"{error}. From the shell: {options}") from error


def _computed(work: Callable[[], Any], plan: Callable[[], Plan], profile: Path | None) -> Any:
    """Compute with a progress bar, profiled against its plan if asked."""
    from basinscope.io.results import progress_bar

    if profile is None:
        with progress_bar():
            return work()
    from basinscope.report.profile import profiled

    with profiled(profile, plan()) as summary, progress_bar():
        result = work()
    err.print(
        f"{summary['seconds']:.2f} s, {summary['gb_per_s']:.2f} GB/s of losses, "
        f"{summary['gflop_per_s']:.1f} GFLOP/s; see {profile / 'profile.html'}",
        soft_wrap=True,
    )
    return result


def _write(result: xr.DataTree, output: Path, settings: dict[str, Any], as_json: bool) -> None:
    from basinscope.io.results import write_result

    write_result(result, output, settings)
    _say_written(output, as_json)


def _say_written(output: Path, as_json: bool) -> None:
    (err if as_json else out).print(f"written to {escape(str(output))}", soft_wrap=True)


def _show_plans(plans: Mapping[str, Plan], as_json: bool, memory_limit: str | None) -> None:
    """Print plans, then refuse what the run would refuse."""
    from dataclasses import asdict

    from basinscope.analysis.memory import parse_memory_limit
    from basinscope.report.tables import plan_table

    if as_json:
        print_json({name: asdict(plan) for name, plan in plans.items()})
    else:
        for name, plan in plans.items():
            out.print(plan_table(name, plan))
            for note in plan.notes:
                out.print(escape(note), soft_wrap=True)
    for plan in plans.values():
        plan.validate(parse_memory_limit(memory_limit))
