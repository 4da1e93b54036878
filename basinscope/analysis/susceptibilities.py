"""Susceptibilities: how the loss of a token responds when only a part of the model moves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import Delayed, delayed

from basinscope.analysis.graphs import array_of
from basinscope.analysis.means import (
    Totals,
    at_checkpoint,
    from_totals,
    mean_losses,
    weighted_means,
    with_totals,
)
from basinscope.analysis.memory import parse_memory_limit
from basinscope.analysis.plan import Layout, Plan, plan_susceptibilities, sequence_blocks
from basinscope.analysis.selections import in_words, numbers_along
from basinscope.analysis.stores import (
    Part,
    Samples,
    at_hand,
    choose_observables,
    cut,
    open_samples,
    unread,
)
from basinscope.io import dims
from basinscope.io.results import write_result

FULL = "full"  # the run that moved all weights
Baseline = Literal["sampling", "task"]
RUN_BYTES = 2**26  # most losses of a run, in memory, that one task takes together
MAY_DIFFER = {  # settings that leave the comparison of two runs fair
    "init_seed", "num_chains", "num_draws", "num_init_loss_batches",
    "save_metrics", "save_sampling_input_ids", "loss_keep_bits", "cores",
}  # fmt: skip


def compute_susceptibilities(
    wr_map: Mapping[str, xr.DataTree | str | os.PathLike[str]],
    sampling_task: str,
    observable_names: Sequence[str] | None = None,
    include_sampling_task: bool = False,
    *,
    baseline: Baseline = "sampling",
    output_path: str | os.PathLike[str] | None = None,
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> xr.DataTree:
    """Estimate the susceptibility of every token's loss to every weight restriction.

    With P the mean loss on the sampling task at a draw of the restricted run, φ = P - mean
    ``init_loss`` of "full" (see ``baseline``), and ℓ the loss of a token,

        sus = E[φ P] - E[φ ℓ] - E[φ] (mean of the task's loss in "full" - E_full[ℓ]),

    after Baker et al. (2025), "Structural inference: interpreting small language models with
    susceptibilities", arXiv:2504.18274, appendix C.4. Every store is read once, chunk by chunk
    (the task's losses twice where the task is an observable too).

    Parameters
    ----------
    wr_map : mapping of str to DataTree or path
        A store for each weight restriction; "full" is the run without one.
    sampling_task : str
        The observable on the data that was sampled on.
    observable_names : sequence of str, optional
        Observables whose tokens are asked about. Default: all but the task.
    include_sampling_task : bool
        Ask about the task's tokens too, where ``observable_names`` is not given.
    baseline : {"sampling", "task"}
        The loss at the checkpoint that φ counts from: of the sampling batches, as devinterp has
        it, or of the very sequences of the task that P is of. The first differs from the second by
        as much as other sequences do, which is in E[φ], and there hides what small restrictions
        do.
    output_path : path, optional
        Compute now and write to a Zarr store; the same call continues a stopped one.
    allow_incomplete : bool
        Take what running or interrupted stores record as written.
    memory_limit : int or str, optional
        Bytes, or such as "2GiB". Default: half of the free memory.

    Returns
    -------
    xr.DataTree
        Lazy, but for token ids in memory. ``/susceptibilities``: ``sus (sus_flat, wr)``, float64,
        in nats², with coordinates ``dataset_id``, ``batch``, ``target_position`` (from 1) along
        ``sus_flat``, and ``sus_mcse``, its standard error, from how chains differ: NaN of one
        chain. ``/context``: ``input_ids (ctx_flat)`` with ``dataset_id``, ``batch``,
        ``position`` (from 0). Of a selection, they are the numbers that the store has. Attribute
        ``dataset_id_to_name`` of both names the observables, sorted.

    Raises
    ------
    ValueError
        If "full" is missing, an observable or the baseline is unknown, or stores differ in their
        settings or their observables; names both sides. Token ids that differ are found when they
        are read: of stores in memory, at once.
    PlanError
        If the memory does not suffice.
    StoreMismatchError
        If ``output_path`` holds a result of other settings; names each that differs.
    ResultLockedError
        If another process is computing the result at ``output_path``.

    Warns
    -----
    UserWarning
        If chains are left out; names them.
    """
    stores = _opened(wr_map, allow_incomplete)
    restrictions = [name for name in stores if name != FULL]
    task, probes = _observables(stores, sampling_task, observable_names, include_sampling_task)
    for name in restrictions:
        _require_alike(stores[FULL], FULL, stores[name], name, [task, *probes])
    losses = _losses(stores, task, probes)
    _plan(losses, task, probes).validate(parse_memory_limit(memory_limit))

    full = stores[FULL]
    init_losses = _baseline(full, task, baseline)
    layouts = {obs_id: Layout.of(losses[FULL][obs_id]) for obs_id in probes}
    places = [(obs_id, rows) for obs_id in probes for rows in sequence_blocks(layouts[obs_id])]
    made_from = _at_once if _at_hand(losses) else _by_block
    below_task = made_from(losses[FULL], task, places, init_losses, _below_task)
    responses = [
        made_from(losses[name], task, places, init_losses, _response) for name in restrictions
    ]
    ids = {obs_id: _common_ids(stores, obs_id) for obs_id in probes}
    unchecked = {obs_id: flat for obs_id, flat in ids.items() if isinstance(flat, Delayed)}
    sizes = [(rows.stop - rows.start) * layouts[obs_id].shape[3] for obs_id, rows in places]

    def of_blocks(make: Callable[..., np.ndarray], *of_run: Mapping[str, bool]) -> da.Array:
        blocks: dict[tuple[int, ...], Delayed] = {
            (block, column): delayed(make)(
                response[block],
                below_task[block],
                obs_id,
                unchecked.get(obs_id),
                *(values[restrictions[column]] for values in of_run),
            )
            for column, response in enumerate(responses)
            for block, (obs_id, _) in enumerate(places)
        }
        return array_of(blocks, (sizes, [1] * len(restrictions)), np.float64)

    in_pairs = {name: stores[name].chains == full.chains for name in restrictions}
    sus, error = of_blocks(_susceptibility), of_blocks(_error, in_pairs)
    result = _flattened(full, restrictions, ids, sus, error)
    if output_path is None:
        return result
    settings = {
        "susceptibilities": {
            "task": task,
            "observables": probes,
            "restrictions": restrictions,
            **({} if baseline == "sampling" else {"baseline": baseline}),
        },
        "sources": {
            name: store.identity([f"loss_{obs_id}" for obs_id in (task, *probes)])
            for name, store in stores.items()
        },
    }
    return write_result(result, output_path, settings)


def plan_of_susceptibilities(
    wr_map: Mapping[str, xr.DataTree | str | os.PathLike[str]],
    sampling_task: str,
    observable_names: Sequence[str] | None = None,
    include_sampling_task: bool = False,
    *,
    baseline: Baseline = "sampling",
    allow_incomplete: bool = False,
    memory_limit: int | str | None = None,
) -> Plan:
    """Plan :func:`compute_susceptibilities` with the same arguments; reads metadata only.

    It is the same under any ``memory_limit``, by which ``Plan.validate`` refuses it.
    """
    stores = _opened(wr_map, allow_incomplete)
    task, probes = _observables(stores, sampling_task, observable_names, include_sampling_task)
    _baseline(stores[FULL], task, baseline)
    return _plan(_losses(stores, task, probes), task, probes)


def _opened(
    wr_map: Mapping[str, xr.DataTree | str | os.PathLike[str]], allow_incomplete: bool
) -> dict[str, Samples]:
    if not isinstance(wr_map, Mapping):
        raise TypeError(
            f"wr_map must map names of restrictions to stores, {FULL!r} among them; got "
            f"{type(wr_map).__name__}"
        )
    if FULL not in wr_map:
        raise ValueError(
            f"wr_map lacks {FULL!r}, the run without a restriction; it has "
            f"{', '.join(wr_map) or 'nothing'}"
        )
    if len(wr_map) == 1:
        raise ValueError(f"wr_map has {FULL!r} only: add a store for each weight restriction")
    return {name: open_samples(store, allow_incomplete) for name, store in wr_map.items()}


def _baseline(full: Samples, task: str, baseline: str) -> list[Any]:
    """Find the losses at the checkpoint that φ counts from; reads nothing."""
    require_baseline(baseline)
    if baseline == "sampling":
        return list(full.init_loss())
    at_start = full.dataset.variables.get(f"init_loss_{task}")
    if at_start is None:
        raise ValueError(
            f"baseline='task' needs init_loss_{task}, which {full.name} has not (devinterp writes "
            "none): leave it out, or sample again"
        )
    return [unread(at_start)]


def require_baseline(baseline: str) -> None:
    """Refuse a baseline that there is not."""
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline={baseline!r}: choose 'sampling' or 'task'")


def _losses(
    stores: Mapping[str, Samples], task: str, probes: Sequence[str]
) -> dict[str, dict[str, list[Part]]]:
    """Find the losses of every store on every observable; reads nothing."""
    return {
        name: {obs_id: store.losses(f"loss_{obs_id}") for obs_id in {task, *probes}}
        for name, store in stores.items()
    }


def _plan(losses: Mapping[str, Mapping[str, list[Part]]], task: str, probes: Sequence[str]) -> Plan:
    return plan_susceptibilities(
        [Layout.of(of_store[task]) for of_store in losses.values()],
        [Layout.of(of_store[obs_id]) for of_store in losses.values() for obs_id in probes],
        len(losses) - 1,
        max(len(of_store[task]) for of_store in losses.values()),
    )


def _observables(
    stores: Mapping[str, Samples], task: str, names: Sequence[str] | None, with_task: bool
) -> tuple[str, list[str]]:
    """Resolve names to ids that "full" has: the task, and what is asked about, sorted."""
    full = stores[FULL]
    (task,) = choose_observables(full, [task])
    if names is None:
        probes = [name for name in full.observables if with_task or name != task]
    else:
        probes = choose_observables(full, list(names))
    if not probes:
        raise ValueError(
            f"no observable is left to ask about: {full.name} has {', '.join(full.observables)} "
            f"and {task!r} is the sampling task; pass include_sampling_task=True, or sample with "
            "another observable"
        )
    return task, sorted(set(probes))


def _require_alike(
    full: Samples, full_name: str, other: Samples, name: str, observables: Sequence[str]
) -> None:
    """Compare settings and shapes of two stores; token ids are compared when they are read."""
    differences = []
    for group in ("sampler", "model", "datasets"):
        ours, theirs = (dict(store.config.get(group, {})) for store in (full, other))
        for settings in (ours, theirs):  # its digest is of the rows that the draws needed
            settings.pop("sampling", None)
        differences += [
            f"{group} {key}: {ours[key]!r} in {full_name!r}, {theirs[key]!r} in {name!r}"
            for key in sorted(ours.keys() & theirs.keys())
            if ours[key] != theirs[key] and key not in MAY_DIFFER
        ]
    ours, theirs = (_functions(store, observables) for store in (full, other))
    differences += [
        f"{what}: {ours[what] or 'none'} in {full_name!r}, {theirs[what] or 'none'} in {name!r}"
        for what in sorted(ours.keys() & theirs.keys())
        if ours[what] != theirs[what]
    ]
    moved = [store.config.get("param_masks", {}).get("elements", 0) for store in (full, other)]
    if moved[0] < moved[1]:
        differences.append(
            f"weights that move: {moved[0]:,} in {full_name!r}, which are to be all of them, "
            f"{moved[1]:,} in {name!r}"
        )
    known, given = (numbers_along(store.dataset, dims.TOKEN_POS) for store in (full, other))
    if not np.array_equal(known, given):
        differences.append(
            f"token positions: {in_words(known)} in {full_name!r}, {in_words(given)} in {name!r}"
        )
    for obs_id in observables:
        if obs_id not in other.observables:
            differences.append(
                f"observable {obs_id!r}: in {full_name!r}, not in {name!r}, which has "
                f"{', '.join(other.observables)}"
            )
            continue
        shapes = [store.dataset.variables[f"loss_{obs_id}"].shape[2:] for store in (full, other)]
        if shapes[0] != shapes[1]:
            differences.append(
                f"(sequences, tokens) of {obs_id!r}: {shapes[0]} in {full_name!r}, {shapes[1]} in "
                f"{name!r}"
            )
    if differences:
        raise ValueError(
            "stores of a set of restrictions must be sampled with the same settings; these "
            "differ:\n  " + "\n  ".join(differences)
        )


def _functions(store: Samples, observables: Sequence[str]) -> dict[str, str | None]:
    """Give what stands for the functions that the caller took losses with."""
    described = store.config.get("observables", [])
    return {"loss_fn": store.config.get("loss_fn")} | {
        f"loss_fn of observable {given['obs_id']!r}": given.get("loss_fn")
        for given in described
        if given["obs_id"] in observables
    }


class Task(NamedTuple):
    """The losses on the task of one run.

    Attributes
    ----------
    phi : list of np.ndarray (draw,)
        φ of each chain.
    mean_phi, mean_phi_loss, mean_loss : np.ndarray (chain,)
        Each chain's part of E[φ], E[φ P], E[P], which is their sum.
    """

    phi: list[np.ndarray]
    mean_phi: np.ndarray
    mean_phi_loss: np.ndarray
    mean_loss: np.ndarray


class Below(NamedTuple):
    """E[P] and E[ℓ] of tokens, both of "full", as the parts of its chains.

    Attributes
    ----------
    of_task : Task
    mean_loss : np.ndarray (chain, batch, token_pos)
    """

    of_task: Task
    mean_loss: np.ndarray

    def mean(self) -> np.ndarray:
        """By how much E[ℓ] is below E[P], (batch, token_pos)."""
        return self.of_task.mean_loss.sum() - self.mean_loss.sum(axis=0)

    def of_chains(self) -> np.ndarray:
        """Its parts, (chain, batch, token_pos)."""
        return self.of_task.mean_loss[:, None, None] - self.mean_loss


class Response(NamedTuple):
    """E[φ P] and E[φ ℓ] of tokens of one run, as the parts of its chains.

    Attributes
    ----------
    of_task : Task
    mean_phi_loss : np.ndarray (chain, batch, token_pos)
    """

    of_task: Task
    mean_phi_loss: np.ndarray

    def mean(self) -> np.ndarray:
        """E[φ P] - E[φ ℓ], (batch, token_pos)."""
        return self.of_task.mean_phi_loss.sum() - self.mean_phi_loss.sum(axis=0)

    def of_chains(self) -> np.ndarray:
        """Its parts, (chain, batch, token_pos)."""
        return self.of_task.mean_phi_loss[:, None, None] - self.mean_phi_loss


Place = tuple[str, slice]  # a block of losses: observable, sequences
Make = Callable[[dict[str, list[Any]], Task], dict[str, Any]]  # of losses on observables


def _at_hand(losses: Mapping[str, Mapping[str, list[Part]]]) -> bool:
    """Whether one task may take all losses of a run."""
    return all(
        sum(part.nbytes for parts in of_run.values() for part in parts) <= RUN_BYTES
        and all(map(at_hand, of_run.values()))
        for of_run in losses.values()
    )


def _at_once(
    losses: Mapping[str, list[Part]],
    task: str,
    places: list[Place],
    init_losses: list[Any],
    make: Make,
) -> list[Delayed]:
    """Have something made of one run's losses, all in one task."""
    probes = {obs_id: losses[obs_id] for obs_id, _ in places}
    return [delayed(_of_losses)(losses[task], init_losses, probes, make)] * len(places)


def _by_block(
    losses: Mapping[str, list[Part]],
    task: str,
    places: list[Place],
    init_losses: list[Any],
    make: Make,
) -> list[Delayed]:
    """Have something made of every block of one run's losses, a task for each."""
    of_task = with_totals(_of_task, losses[task], init_losses)
    return [
        delayed(make)({obs_id: [cut(part, slice(None), rows) for part in losses[obs_id]]}, of_task)
        for obs_id, rows in places
    ]


def _of_losses(
    on_task: list[np.ndarray],
    init_losses: list[Any],
    probes: dict[str, list[np.ndarray]],
    make: Make,
) -> dict[str, Any]:
    return make(probes, from_totals(_of_task, on_task, init_losses))


def _of_task(totals: list[Totals], shapes: list[tuple[int, ...]], init_losses: list[Any]) -> Task:
    losses, _ = mean_losses(totals, shapes)
    init_loss = at_checkpoint(init_losses).mean()
    phi = [trace - init_loss for trace in losses]
    draws = sum(map(len, phi))

    def parts(values: list[np.ndarray]) -> np.ndarray:
        return np.array([own.sum() for own in values]) / draws

    of_both = [own * loss for own, loss in zip(phi, losses, strict=True)]
    return Task(phi, parts(phi), parts(of_both), parts(losses))


def _below_task(probes: dict[str, list[Any]], of_task: Task) -> dict[str, Below]:
    return {obs_id: Below(of_task, weighted_means(losses)) for obs_id, losses in probes.items()}


def _response(probes: dict[str, list[Any]], of_task: Task) -> dict[str, Response]:
    return {
        obs_id: Response(of_task, weighted_means(losses, of_task.phi))
        for obs_id, losses in probes.items()
    }


def _shares(of_task: Task) -> np.ndarray:
    draws = np.array([len(own) for own in of_task.phi])
    return draws / draws.sum()


def _susceptibility(
    responses: dict[str, Response],
    below_task: dict[str, Below],
    obs_id: str,
    checked_ids: np.ndarray | None,  # not used, but no number is given before they are
) -> np.ndarray:
    response, below = responses[obs_id], below_task[obs_id]
    return (response.mean() - response.of_task.mean_phi.sum() * below.mean()).reshape(-1, 1)


def _error(
    responses: dict[str, Response],
    below_task: dict[str, Below],
    obs_id: str,
    checked_ids: np.ndarray | None,
    in_pairs: bool,
) -> np.ndarray:
    """Give the standard error, to first order: of what differs between chains of the two runs.

    Chains of one number have the same noise and see the same batches in both runs, by which the
    two errors partly cancel.
    """
    response, below = responses[obs_id], below_task[obs_id]
    mean_phi = response.of_task.mean_phi
    by_chain = response.of_chains() - mean_phi[:, None, None] * below.mean()
    own = _apart(by_chain, _shares(response.of_task))
    of_full = mean_phi.sum() * _apart(below.of_chains(), _shares(below.of_task))
    if in_pairs:
        return np.sqrt(_squared_error(own - of_full)).reshape(-1, 1)
    return np.sqrt(_squared_error(own) + _squared_error(of_full)).reshape(-1, 1)


def _apart(parts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Take from each chain's part of a mean over all draws its share of the mean."""
    return parts - shares[:, None, None] * parts.sum(axis=0)


def _squared_error(apart: np.ndarray) -> np.ndarray:
    """Of the sum of independent parts with no mean of their own; NaN of a single one."""
    chains = len(apart)
    scale = chains / (chains - 1) if chains > 1 else np.nan
    return scale * np.square(apart).sum(axis=0)


def _flattened(
    full: Samples,
    restrictions: list[str],
    ids: dict[str, Delayed | np.ndarray],
    sus: da.Array,
    error: da.Array,
) -> xr.DataTree:
    """Lay susceptibilities and contexts out flat, (batch, position) row-major per observable."""
    probes = list(ids)
    names = {"dataset_id_to_name": probes}
    variables = full.dataset.variables
    losses = [variables[f"loss_{obs_id}"] for obs_id in probes]
    contexts = [variables[f"input_ids_{obs_id}"] for obs_id in probes]
    flat_ids = [
        da.from_delayed(flat, (context.size,), context.dtype) if isinstance(flat, Delayed) else flat
        for flat, context in zip(ids.values(), contexts, strict=True)
    ]
    first = xr.Variable(
        ("sus_flat", "wr"), sus,
        {"long_name": "susceptibility of a token's loss to a weight restriction", "units": "nats2"},
    )  # fmt: skip
    second = xr.Variable(
        ("sus_flat", "wr"), error, {"long_name": "standard error of sus", "units": "nats2"},
    )  # fmt: skip
    context = xr.Variable(
        "ctx_flat", np.concatenate(flat_ids),
        {"long_name": "token ids of the sequences", "units": "1"},
    )  # fmt: skip
    flat = _flat_coordinates("sus_flat", full.dataset, losses, "target_position")
    flat_context = _flat_coordinates("ctx_flat", full.dataset, contexts, "position")
    tree = xr.DataTree(xr.Dataset(attrs=full.provenance))
    tree.children = {
        "susceptibilities": xr.DataTree(
            xr.Dataset({"sus": first, "sus_mcse": second}, {**flat, "wr": restrictions}, names)
        ),
        "context": xr.DataTree(xr.Dataset({"input_ids": context}, flat_context, names)),
    }
    return tree


def _flat_coordinates(
    dim: str, dataset: xr.Dataset, variables: Sequence[xr.Variable], position: str
) -> dict[str, tuple[str, np.ndarray]]:
    """Number sequences and tokens, the last two dimensions of the variables, as the store does."""
    shapes = [variable.shape[-2:] for variable in variables]
    total = sum(sequences * tokens for sequences, tokens in shapes)
    columns = {name: np.empty(total, np.int64) for name in ("dataset_id", "batch", position)}
    first = 0
    for number, (variable, shape) in enumerate(zip(variables, shapes, strict=True)):
        batch, token = (numbers_along(dataset, str(along)) for along in variable.dims[-2:])
        flat = slice(first, first + len(batch) * len(token))
        columns["dataset_id"][flat] = number
        columns["batch"][flat].reshape(shape)[:] = batch[:, None]
        columns[position][flat].reshape(shape)[:] = token
        first = flat.stop
    return {name: (dim, column) for name, column in columns.items()}


def _common_ids(stores: Mapping[str, Samples], obs_id: str) -> Delayed | np.ndarray:
    """Give the token ids of an observable, the same in every store; at once where none is read."""
    name = f"input_ids_{obs_id}"
    ids: dict[str, Any] = {
        run: unread(store.dataset.variables[name]) for run, store in stores.items()
    }
    in_memory = all(isinstance(array, np.ndarray) for array in ids.values())
    return (_checked_ids if in_memory else delayed(_checked_ids))(obs_id, ids)


def _checked_ids(obs_id: str, ids: dict[str, np.ndarray]) -> np.ndarray:
    full = ids[FULL]
    for name, other in ids.items():
        if not np.array_equal(full, other):
            at = np.argwhere(full != other)[0].tolist() if full.shape == other.shape else "shape"
            raise ValueError(
                f"token ids of observable {obs_id!r} differ between {FULL!r} and {name!r} (first "
                f"at {at}): sample every restriction with the same observables and obs_seed"
            )
    return full.ravel()
