"""bif_reliability: the formula, what other chains then say, and nothing read before it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis import reliability as reliability_module
from basinscope.analysis import traces
from basinscope.analysis.bif import cuts
from basinscope.analysis.plan import PRODUCTS_AT_ONCE, PlanError
from basinscope.analysis.reliability import plan_bif_reliability
from basinscope.report.tables import reliability_note
from tests.analysis.stores_random import random_tree, write_devinterp_tree
from tests.analysis.stores_recorded import recorded_store
from tests.sampling.test_error_of_llc import trained_model

KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"correlation_method": "sequence"},
    "average": {"average_tokenwise_bif": True},
    "covariance": {"compute_covariance": True},
}
SIZES: dict[str, Any] = {"chains": 4, "draws": 20, "tokens": 3, "observables": {"a": 4, "b": 3}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 2])
def test_it_is_its_formula(kind: str, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree(3, **SIZES)
    if block:
        monkeypatch.setattr(reliability_module, "cuts", lambda count, _: cuts(count, block))
    got = basinscope.bif_reliability(tree, **KINDS[kind]).compute()
    reliability, agreement = plain(tree, kind)
    np.testing.assert_allclose(got["reliability"], reliability, rtol=1e-4)
    np.testing.assert_allclose(got["agreement"], agreement, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.diagonal(got["agreement"]), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("signal", "together"), [(0.0, 0), (0.4, 0), (1.5, 0), (0.4, 6)])
def test_it_is_how_influences_of_other_chains_correlate(
    kind: str, signal: float, together: float
) -> None:
    """24 pairs of runs. The reliabilities' own spread is below 0.03 on average, bounds are 0.1."""
    rng = np.random.default_rng(4)
    loadings = rng.normal(together, 1, (20, 2, 2))  # of sequences and tokens on two factors

    def chains() -> xr.DataTree:
        noise, factors = rng.standard_normal((3, 40, 20, 2)), rng.standard_normal((3, 40, 2))
        for draw in range(1, 40):  # with a memory of a few draws
            noise[:, draw] += 0.7 * noise[:, draw - 1]
            factors[:, draw] += 0.7 * factors[:, draw - 1]
        losses = signal * np.einsum("stf,cdf->cdst", loadings, factors) + noise
        tree = random_tree(0, chains=3, draws=40, tokens=2, observables={"a": 20})
        tree.dataset = tree.to_dataset().assign(
            loss_a=(("chain", "draw", "batch_a", "token_pos"), losses)
        )
        return tree

    correlations, reliabilities = [], []
    for _ in range(24):
        runs = [chains(), chains()]
        pairs = [between_sequences(basinscope.compute_bif(run, **KINDS[kind])) for run in runs]
        correlations.append(np.corrcoef(pairs)[0, 1])
        found = [basinscope.bif_reliability(run, **KINDS[kind])["reliability"] for run in runs]
        reliabilities.append(np.mean([float(value) for value in found]))
    expected = {0.0: (-0.1, 0.1), 0.4: (0.05, 0.9), 1.5: (0.6, 1.0)}[signal]
    assert expected[0] < np.mean(correlations) < expected[1], "the test is about all of the scale"
    assert np.mean(reliabilities) == pytest.approx(np.mean(correlations), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_trained_model_it_is_how_other_seeds_correlate(kind: str, tmp_path: Path) -> None:
    model, rows = trained_model()
    trees = [
        basinscope.sample(
            model, rows, {"seen": (rows, 8)}, lr=1e-3, n_beta=100.0, localization=50.0,
            num_draws=150, num_burnin_steps=50, batch_size=8, init_seed=1000 * run,
            device="cpu", progress=False, output_path=tmp_path / f"{run}.zarr",
        )
        for run in range(4)
    ]  # fmt: skip
    pairs = [between_sequences(basinscope.compute_bif(tree, **KINDS[kind])) for tree in trees]
    correlation = np.corrcoef(pairs)[np.triu_indices(4, 1)].mean()
    found = [float(basinscope.bif_reliability(t, **KINDS[kind])["reliability"]) for t in trees]
    assert np.mean(found) == pytest.approx(correlation, abs=0.06)


def test_chains_that_say_the_same_are_reliable_and_agree() -> None:
    tree = random_tree(3, **SIZES)
    first = tree["loss_a"].isel(chain=[0])
    tree.dataset = tree.to_dataset()[["init_loss", "n_beta", "input_ids_a"]].assign(
        loss_a=xr.concat([first] * 4, "chain")
    )
    got = basinscope.bif_reliability(tree)
    np.testing.assert_allclose(got["reliability"], 1, atol=1e-5)
    np.testing.assert_allclose(got["agreement"], 1, atol=1e-5)


def test_a_chain_somewhere_else_agrees_with_none() -> None:
    rng = np.random.default_rng(0)
    loadings = rng.normal(0, 1, (2, 8, 3))
    factor = rng.standard_normal((4, 60, 1, 1))
    of_chain = loadings[[0, 0, 1, 0]][:, None]
    losses = factor * of_chain + 0.5 * rng.standard_normal((4, 60, 8, 3))
    tree = random_tree(0, chains=4, draws=60, tokens=3, observables={"a": 8})
    tree.dataset = tree.to_dataset().assign(
        loss_a=(("chain", "draw", "batch_a", "token_pos"), losses)
    )
    agreement = basinscope.bif_reliability(tree)["agreement"].to_numpy()
    same = agreement[np.ix_([0, 1, 3], [0, 1, 3])]
    assert same.min() > 0.7
    assert np.abs(agreement[2, [0, 1, 3]]).max() < 0.4


def test_tokens_that_never_change_are_left_out() -> None:
    tree = random_tree(3, **SIZES)
    constant = tree["loss_a"].copy()
    constant[:, :, 1, 2] = 2.0
    constant[:, :, 3] = 1.0
    tree.dataset = tree.to_dataset().assign(loss_a=constant)
    got = basinscope.bif_reliability(tree, loss_keys=["a"])
    reliability, agreement = plain(tree, "token", keys=["a"])
    np.testing.assert_allclose(got["reliability"], reliability, rtol=1e-4)
    np.testing.assert_allclose(got["agreement"], agreement, rtol=1e-4, atol=1e-5)


def test_a_selection_of_sequences() -> None:
    rows = [3, 0, 7]
    tree = random_tree(3, **{**SIZES, "observables": {"a": 10}})
    got = basinscope.bif_reliability(tree, batch_index_range=rows)
    tree.dataset = tree.to_dataset().isel(batch_a=rows)
    np.testing.assert_allclose(got["reliability"], plain(tree, "token")[0], rtol=1e-4)


def test_a_foreign_layout_in_little_memory_goes_through_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = random_tree(4, chains=3, draws=60, observables={"a": 12, "b": 3})
    path = write_devinterp_tree(tree, tmp_path / "theirs.zarr")
    copies: list[Any] = []
    copy = traces.Traces.copy
    monkeypatch.setattr(traces.Traces, "copy", lambda self: (copies.append(1), copy(self))[1])
    monkeypatch.setattr("basinscope.io.copy.CHUNK_BYTES", 1000)
    limit = plan_bif_reliability(path, memory_limit=1).least_memory
    while plan_bif_reliability(path, memory_limit=limit).peak_memory > limit:
        limit += 500
    assert plan_bif_reliability(path, memory_limit=limit).bytes_to_write
    got = basinscope.bif_reliability(path, memory_limit=limit).compute()
    assert copies
    assert float(got["reliability"]) == pytest.approx(plain(tree, "token")[0], rel=1e-4)


def test_nothing_is_computed_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(reliability_module, "_sums", refuse)
    lazy = basinscope.bif_reliability(random_tree(3, **SIZES))
    with pytest.raises(AssertionError, match="something was computed"):
        lazy["reliability"].compute()


def test_two_chains_agree_or_not_and_one_does_neither() -> None:
    tree = random_tree(3, **{**SIZES, "chains": 2})
    got = basinscope.bif_reliability(tree)
    assert np.isnan(got["reliability"])
    np.testing.assert_allclose(got["agreement"], plain(tree, "token")[1], rtol=1e-4)
    with pytest.raises(ValueError, match="one chain, and reliability is how far chains agree"):
        basinscope.bif_reliability(random_tree(3, **{**SIZES, "chains": 1}))


def test_chains_of_different_lengths(tmp_path: Path) -> None:
    written = [20, 20, 11, 4]
    tree = random_tree(3, **{**SIZES, "steps": 20})
    store = recorded_store(tmp_path / "s.zarr", tree, written)
    losses = np.concatenate([tree["loss_a"], tree["loss_b"]], axis=2).astype(np.float64)
    chains = [own[:rows] for own, rows in zip(losses, written, strict=True)]
    for kind, options in KINDS.items():
        got = basinscope.bif_reliability(store, allow_incomplete=True, **options)
        np.testing.assert_allclose(got["reliability"], plain_of(chains, kind)[0], rtol=1e-4)


def test_of_one_pair_nothing_can_be_said() -> None:
    tree = random_tree(3, **SIZES)
    for options in (KINDS["sequence"], KINDS["average"]):
        got = basinscope.bif_reliability(tree, batch_index_range=[1, 3], **options)
        assert np.isnan(got["reliability"])
        assert "one pair" in reliability_note(got)
    assert np.isfinite(basinscope.bif_reliability(tree, batch_index_range=[1, 3])["reliability"])


@pytest.mark.parametrize("rows", [[2], [1, 3, 1]])
def test_it_wants_different_sequences(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="give two or more, each once"):
        basinscope.bif_reliability(random_tree(3, **SIZES), batch_index_range=rows)


def test_its_plan_counts_the_products_of_draws() -> None:
    tree = random_tree(3, **SIZES)
    plan = basinscope.plan("bif_reliability", tree)
    assert plan.flops == 2 * 7 * 3 * 80**2
    assert plan.output_bytes == 8 * (4 * 4 + 1)
    fewer = basinscope.plan("bif_reliability", tree.isel(draw=slice(10)))
    of_block = 4 * 12 * plan.workers  # a sequence's traces are 12 tokens' here
    products = (1 + PRODUCTS_AT_ONCE * plan.workers) * 8 * (80**2 - 40**2)
    assert products < plan.peak_memory - fewer.peak_memory < products + of_block * 80 * 7
    assert plan.bytes_to_read == plan.stored_bytes
    sequences = basinscope.plan("bif_reliability", tree, correlation_method="sequence")
    assert sequences.flops == 2 * 7 * 80**2
    with pytest.raises(PlanError, match="the reliability of influences needs"):
        basinscope.bif_reliability(tree, memory_limit=1000)


def between_sequences(bif: xr.Dataset) -> np.ndarray:
    """Influences of pairs of different sequences."""
    values = bif["influences"].to_numpy()
    return values[~np.eye(len(values), dtype=bool)].ravel()


def plain(tree: xr.DataTree, kind: str, keys: list[str] | None = None) -> tuple[float, Any]:
    """Reliability and agreement with every influence made, in float64."""
    names = [f"loss_{key}" for key in keys] if keys else sorted(
        str(name) for name in tree.data_vars if str(name).startswith("loss_")
    )  # fmt: skip
    losses = np.concatenate([tree[name].to_numpy().astype(np.float64) for name in names], axis=2)
    return plain_of(list(losses), kind)


def plain_of(chains: list[np.ndarray], kind: str) -> tuple[float, Any]:
    """Judge losses (draw, sequence, token) of each chain, pair by pair."""
    draws = [len(chain) for chain in chains]
    count, samples = len(chains), sum(draws)
    x = np.concatenate(chains).transpose(1, 2, 0)
    x = x.mean(1, keepdims=True) if kind == "sequence" else x
    x = x - x.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        x = x / (np.sqrt(samples - 1) if kind == "covariance" else length)
    directions = [np.sqrt(np.array(draws) / samples)]
    for c in range(1, count):  # Gram and Schmidt
        axis = np.eye(count)[c]
        axis = axis - sum(axis @ other * other for other in directions)
        directions.append(axis / np.linalg.norm(axis))
    places = np.split(np.arange(samples), np.cumsum(draws)[:-1])
    means = np.stack([x[..., own].mean(-1) for own in places], axis=-1)
    parts = [x[..., own] - means[..., [c]] for c, own in enumerate(places)]
    parts += [(np.sqrt(draws) * means @ direction)[..., None] for direction in directions[1:]]
    lengths = np.stack([(part**2).sum(-1) for part in parts])
    if kind == "average":
        x, parts = x.mean(1, keepdims=True), [part.mean(1, keepdims=True) for part in parts]
        lengths = lengths.mean(2, keepdims=True)
    sequence = np.repeat(np.arange(len(x)), x.shape[1])
    flat = x.reshape(len(sequence), -1)
    known = np.isfinite(flat).all(1)
    flat, sequence = flat[known], sequence[known]
    pairs = sequence[:, None] != sequence[None, :]

    influence = flat @ flat.T
    mean = 0.0 if kind == "covariance" else influence[pairs].mean()
    shares = []
    for part, length in zip(parts, lengths, strict=True):
        own, share = part.reshape(len(known), -1)[known], length.ravel()[known]
        shares.append((own @ own.T - mean * (share[:, None] + share[None, :]) / 2)[pairs])
    np.testing.assert_allclose(sum(shares) + mean, influence[pairs], atol=1e-12)

    noise = 0.0
    sizes = [np.array(draws) / samples, np.ones(count - 1) / (count - 1)]
    for same, size in zip((shares[:count], shares[count:]), sizes, strict=True):
        pairwise = np.cov(same, bias=True).reshape(len(same), -1)
        alike = pairwise.sum() - np.trace(pairwise)
        noise += pairwise.sum() - alike / (1 - (size**2).sum()) if len(same) > 1 else np.nan
    return 1 - noise / np.var(influence[pairs]), np.corrcoef(shares[:count])
