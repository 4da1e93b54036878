"""bif_chance: the formula, and what the strongest of unrelated tokens then reaches."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import xarray as xr

import basinscope
from basinscope.analysis import chance as chance_module
from basinscope.analysis.plan import PlanError
from basinscope.analysis.shares import shares_of
from tests.analysis.stores_random import random_tree

SIZES: dict[str, Any] = {"chains": 4, "draws": 20, "tokens": 3, "observables": {"a": 4, "b": 3}}
QUERIES = [(0, 1), (5, 3), (0, 3), (6, 2)]


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("pieces", ["whole", "small"])
def test_it_is_its_formula(covariance: bool, pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces == "small":
        monkeypatch.setattr(chance_module, "QUERY_PANEL", 3)
        monkeypatch.setattr(chance_module, "PAIRS_BYTES", 1)
    tree = random_tree(3, **SIZES)
    got = basinscope.bif_chance(tree, QUERIES, compute_covariance=covariance).compute()
    assert got["query_batch"].values.tolist() == [0, 5, 0, 6]
    assert got["query_target_position"].values.tolist() == [1, 3, 3, 2]
    for at, query in enumerate(QUERIES):
        expected = plain(tree, query, covariance)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][at], value, rtol=1e-4, err_msg=name)


def test_unrelated_tokens_reach_it_and_related_ones_pass_it() -> None:
    """24 runs, whose strongest of 597 spread by 0.08 of it: bounds are six standard errors."""
    rng = np.random.default_rng(2)
    strongest, by_chance, reliable, found = [], [], [], []
    for _ in range(24):
        noise = rng.standard_normal((4, 60, 200, 3))
        for draw in range(1, 60):
            noise[:, draw] += 0.6 * noise[:, draw - 1]
        noise[:, :, 1:3, 0] += 2 * noise[:, :, :1, 0]  # two of them rise and fall with 0:1
        tree = random_tree(0, chains=4, draws=60, tokens=3, observables={"a": 200})
        tree.dataset = tree.to_dataset().assign(
            loss_a=(("chain", "draw", "batch_a", "token_pos"), noise)
        )
        chance = basinscope.bif_chance(tree, [(0, 1), (9, 2)]).compute()
        top = basinscope.compute_bif(tree, top_k=3, queries=[(0, 1), (9, 2)]).compute()
        found.append(top["partner_batch"].sel(sign="positive").values[0, :2])
        assert (top["influences"].values[0, 0, :2] > 1.5 * float(chance["by_chance"][0])).all()
        of_other = np.abs(top["influences"].values[:, 1, 0])
        strongest.append(of_other.mean())
        by_chance.append(float(chance["by_chance"][1]))
        reliable.append(chance["reliability"].values)
    assert all(set(pair) == {1, 2} for pair in found)
    assert np.mean(by_chance) == pytest.approx(np.mean(strongest), rel=0.1)
    of_real, of_none = np.mean(reliable, axis=0)
    assert of_real > 0.15
    assert abs(of_none) < 0.05


def test_where_all_rise_and_fall_together_it_is_what_other_chains_differ_by() -> None:
    """24 pairs of runs, whose differences spread by 3%: bounds are six standard errors."""
    rng = np.random.default_rng(3)
    loadings = rng.uniform(0.5, 2.5, (60, 2))
    differences, noise = [], []
    for _ in range(24):
        influences = []
        for _ in range(2):
            own = rng.standard_normal((4, 50, 60, 2))
            losses = own + rng.standard_normal((4, 50, 1, 1)) * loadings
            tree = random_tree(0, chains=4, draws=50, tokens=2, observables={"a": 60})
            tree.dataset = tree.to_dataset().assign(
                loss_a=(("chain", "draw", "batch_a", "token_pos"), losses)
            )
            bif = basinscope.compute_bif(tree, batch_index_range_1=[7])["influences"].values
            influences.append(np.delete(bif[0, :, 1], 7, axis=0).ravel())
            noise.append(float(basinscope.bif_chance(tree, [(7, 2)])["noise"][0]))
        differences.append((influences[0] - influences[1]).std() / np.sqrt(2))
    ratio = np.sqrt(np.mean(np.square(noise)) / np.mean(np.square(differences)))
    assert 0.8 < ratio < 1.2


def test_only_partners_that_are_looked_for_count() -> None:
    tree = random_tree(3, **SIZES)
    got = basinscope.bif_chance(tree, [(1, 2)], loss_keys=["b"], batch_index_range=[0, 2])
    picked = random_tree(3, **SIZES)
    picked.dataset = picked.to_dataset().drop_vars(["loss_a", "input_ids_a"])
    expected = plain(picked, (1, 2), partners=[0, 2])
    np.testing.assert_allclose(got["noise"], [expected["noise"]], rtol=1e-4)
    np.testing.assert_allclose(got["by_chance"], [expected["by_chance"]], rtol=1e-4)


def test_losses_that_never_change_are_no_partners_and_have_none() -> None:
    tree = random_tree(3, **SIZES)
    constant = tree["loss_a"].copy()
    constant[:, :, 1, 2] = 2.0
    tree.dataset = tree.to_dataset().assign(loss_a=constant)
    got = basinscope.bif_chance(tree, [(0, 1), (1, 3)]).compute()
    for name, value in plain(tree, (0, 1)).items():
        np.testing.assert_allclose(got[name][0], value, rtol=1e-4)
        assert np.isnan(got[name][1])


def test_chains_of_several_lengths_fall_into_the_same_shares() -> None:
    draws = [5, 9, 3, 7]
    traces = np.random.default_rng(0).standard_normal((6, 24))
    traces -= traces.mean(axis=1, keepdims=True)
    of_means = np.concatenate(shares_of(traces, draws)[4:], axis=-1)
    np.testing.assert_allclose(traces @ chance_module._directions(draws), of_means, atol=1e-12)


def test_nothing_is_computed_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(chance_module, "_sums", refuse)
    lazy = basinscope.bif_chance(random_tree(3, **SIZES), QUERIES)
    with pytest.raises(AssertionError, match="something was computed"):
        lazy["noise"].compute()


def test_what_does_not_fit_is_refused() -> None:
    tree = random_tree(3, **SIZES)
    with pytest.raises(ValueError, match=r"queries ask for \(batch, target_position\) \(9, 1\)"):
        basinscope.bif_chance(tree, [(9, 1)])
    with pytest.raises(ValueError, match="chance is what chains disagree about"):
        basinscope.bif_chance(random_tree(3, **{**SIZES, "chains": 1}), QUERIES)
    with pytest.raises(PlanError, match="what influences reach by chance needs"):
        basinscope.bif_chance(tree, QUERIES, memory_limit=1000)
    two = basinscope.bif_chance(random_tree(3, **{**SIZES, "chains": 2}), QUERIES)
    assert np.isnan(two["noise"]).all()


def plain(
    tree: xr.DataTree,
    query: tuple[int, int],
    covariance: bool = False,
    partners: list[int] | None = None,
) -> dict[str, float]:
    """Reliability, noise and chance of a query with every influence made, in float64."""
    names = sorted(str(name) for name in tree.data_vars if str(name).startswith("loss_"))
    losses = np.concatenate([tree[name].to_numpy().astype(np.float64) for name in names], axis=2)
    chains, draws, sequences, tokens = losses.shape
    x = losses.transpose(2, 3, 0, 1).reshape(sequences * tokens, -1)
    x = x - x.mean(-1, keepdims=True)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        x = x / (np.sqrt(chains * draws - 1) if covariance else length)
    x = x.reshape(-1, chains, draws)
    sequence = np.repeat(np.arange(sequences), tokens)
    others = (sequence != query[0]) & np.isfinite(x).all((1, 2))
    if partners is not None:
        others &= np.isin(sequence, partners)
    own, x = x[query[0] * tokens + query[1] - 1], x[others]

    shares = [
        (x[:, c] - x[:, c].mean(-1, keepdims=True)) @ (own[c] - own[c].mean())
        for c in range(chains)
    ]
    directions = [np.full(chains, chains**-0.5)]
    for c in range(1, chains):  # Gram and Schmidt
        axis = np.eye(chains)[c]
        axis = axis - sum(axis @ other * other for other in directions)
        directions.append(axis / np.linalg.norm(axis))
    shares += [
        draws * (x.mean(-1) @ direction) * (own.mean(-1) @ direction)
        for direction in directions[1:]
    ]
    lengths = [np.square(x[:, c] - x[:, c].mean(-1, keepdims=True)).sum(-1) for c in range(chains)]
    lengths += [draws * (x.mean(-1) @ direction) ** 2 for direction in directions[1:]]
    influence = x.reshape(len(x), -1) @ own.ravel()
    np.testing.assert_allclose(sum(shares), influence, atol=1e-12)
    if not covariance:
        shares = [s - influence.mean() * a / 2 for s, a in zip(shares, lengths, strict=True)]
    noise = 0.0
    for same in (shares[:chains], shares[chains:]):
        count = len(same)
        noise += count / (count - 1) * (sum(map(np.var, same)) - np.var(sum(same)) / count)
    deviation = float(np.sqrt(max(noise, 0.0)))
    return {
        "reliability": 1 - noise / float(np.var(sum(shares))),
        "noise": deviation,
        "by_chance": deviation * NormalDist().inv_cdf(1 - 1 / len(x)),
    }
