"""What the figures show equals what numpy computes from small stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from basinscope.report import figures

N_BETA = 12.0
NAMES = ("code", "prose")


def small_tree(**data: xr.DataArray) -> xr.DataTree:
    draws = np.random.default_rng(0)
    sizes = {"chain": 3, "step": 12, "batch_sampling": 4, "token_pos": 5}
    arrays = {
        "sampling_loss_micro": (tuple(sizes), 2 + draws.random(tuple(sizes.values()))),
        "init_loss": (("chain", "token_pos"), 2 + draws.random((3, 5)) / 10),
        "n_beta": ((), N_BETA),
    }
    for name in NAMES:
        dims = ("chain", "draw", f"batch_{name}", "token_pos")
        arrays[f"loss_{name}"] = (dims, 1 + draws.random((3, 6, 7, 5)))
    dataset = xr.Dataset(arrays).map(lambda values: values.astype("float32"), keep_attrs=True)
    dataset = dataset.assign(n_beta=N_BETA)
    dataset.attrs = {"metadata": {"config": {"sampler": {"n_beta": N_BETA}}}, "completed": 1}
    return xr.DataTree(dataset.assign(data))


def small_llc(chains: int = 3, steps: int = 12) -> xr.Dataset:
    trace = 2 + np.random.default_rng(1).random((chains, steps))
    return xr.Dataset(
        {"loss_trace": (("chain", "step"), trace), "init_loss": 2.1, "n_beta": N_BETA}
    )


def line(figure: Figure, gid: str) -> np.ndarray:
    (found,) = figure.findobj(lambda artist: isinstance(artist, Line2D) and artist.get_gid() == gid)
    return np.asarray(found.get_ydata())


def test_loss_traces_are_the_losses() -> None:
    llc = small_llc(steps=40)
    figure = figures.loss_traces(llc)
    for chain in range(3):
        losses = llc.loss_trace.values[chain]
        np.testing.assert_array_equal(line(figure, f"loss {chain}"), losses)
        means = [losses[start : start + 4].mean() for start in range(37)]
        np.testing.assert_allclose(line(figure, f"smoothed {chain}"), means)
    (axes,) = figure.axes
    (checkpoint,) = (drawn for drawn in axes.lines if drawn.get_label() == "at the checkpoint")
    assert set(checkpoint.get_ydata()) == {2.1}
    assert "nats per token" in axes.get_ylabel()


def test_running_llc_ends_at_the_llc() -> None:
    llc = small_llc()
    figure = figures.running_llc(llc)
    trace = llc.loss_trace.values
    for chain in range(3):
        expected = [N_BETA * (trace[chain, :n].mean() - 2.1) for n in range(1, 13)]
        np.testing.assert_allclose(line(figure, f"llc {chain}"), expected)
    per_chain = N_BETA * (trace.mean(axis=1) - 2.1)
    (axes,) = figure.axes
    (mean,) = (drawn for drawn in axes.lines if str(drawn.get_label()).startswith("mean"))
    assert mean.get_ydata()[-1] == pytest.approx(per_chain.mean())
    assert mean.get_label() == f"mean: {per_chain.mean():.1f}"
    said = f"band: spread between chains (std {per_chain.std():.1f} at the end)"
    assert axes.get_title("left") == said
    band = axes.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 12, 1]
    assert at_end.max() == pytest.approx(per_chain.mean() + per_chain.std())
    assert at_end.min() == pytest.approx(per_chain.mean() - per_chain.std())


def test_chains_keep_their_numbers_and_one_step_is_enough() -> None:
    llc = small_llc(chains=2, steps=1).assign_coords(chain=[1, 3])
    for figure in (figures.loss_traces(llc), figures.running_llc(llc)):
        labels = figure.axes[0].get_legend_handles_labels()[1]
        assert {"chain 1", "chain 3"} < set(labels)


def test_steps_keep_their_numbers_when_the_first_are_left_out() -> None:
    llc = small_llc().assign_coords(step=np.arange(30, 42))
    (axes,) = figures.loss_traces(llc).axes
    assert axes.get_xlim() == (31, 42)
    assert all(line.get_xdata()[-1] == 42 for line in axes.lines if line.get_gid())
    (axes,) = figures.running_llc(llc).axes
    assert axes.get_xlim() == (1, 12)
    assert axes.get_xlabel() == "steps averaged, after the first 30"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_token_loss_shift(lazy: bool, from_checkpoint: bool) -> None:
    tree = small_tree()
    losses = {name: tree[f"loss_{name}"].values.astype(float) for name in NAMES}
    start = {name: values[:, 0].mean(axis=0) for name, values in losses.items()}
    if from_checkpoint:
        start["prose"] = np.full((7, 5), 1.25)
        known = xr.Variable(("batch_prose", "token_pos"), np.full((7, 5), 1.25, np.float32))
        tree = xr.DataTree(tree.to_dataset().assign(init_loss_prose=known))
    figure = figures.token_loss_shift(tree.chunk() if lazy else tree)
    assert len(figure.axes) == 4
    for row, name in enumerate(NAMES):
        shift = losses[name].mean(axis=(0, 1)) - start[name]
        by_position, histogram = figure.axes[2 * row : 2 * row + 2]
        (drawn,) = (line for line in by_position.lines if line.get_gid() == "shift")
        np.testing.assert_allclose(drawn.get_ydata(), shift.mean(axis=0), atol=1e-6)
        edges = [bar.get_x() for bar in histogram.patches]
        edges.append(histogram.patches[-1].get_x() + histogram.patches[-1].get_width())
        assert sum(bar.get_height() for bar in histogram.patches) == shift.size
        np.testing.assert_allclose([edges[0], edges[-1]], [shift.min(), shift.max()], atol=1e-6)
        source = "checkpoint" if from_checkpoint and name == "prose" else "first draw"
        assert by_position.get_title("left").endswith(source)


def test_token_loss_shift_leaves_out_the_draws_of_the_burn_in() -> None:
    tree = small_tree()
    sampler = {"n_beta": N_BETA, "num_burnin_steps": 2, "num_steps_bw_draws": 2}
    tree.attrs["metadata"] = {"config": {"sampler": sampler}}  # draws at steps 2, 4, ... 12
    figure = figures.token_loss_shift(tree, "prose", burn_in=5)
    losses = tree["loss_prose"].values.astype(float)
    shift = losses[:, 2:].mean(axis=(0, 1)) - losses[:, 0].mean(axis=0)
    np.testing.assert_allclose(line(figure, "shift"), shift.mean(axis=0), atol=1e-6)
    said = "prose: mean of the draws after step 5 minus the first draw"
    assert figure.axes[0].get_title("left") == said
    with pytest.raises(ValueError, match=r"burn_in=13 leaves nothing to average: .* 6 draws"):
        figures.token_loss_shift(tree, burn_in=13)


def test_one_observable_can_be_chosen() -> None:
    figure = figures.token_loss_shift(small_tree(), "prose")
    assert [axes.get_title("left")[:5] for axes in figure.axes] == ["prose", ""]


def test_errors() -> None:
    with pytest.raises(KeyError, match=r"no observable 'poems'; it has \['code', 'prose'\]"):
        figures.token_loss_shift(small_tree(), "poems")


def test_save_figures_writes_what_the_store_has(tmp_path: Path) -> None:
    tree = small_tree()
    paths = figures.save_figures(tree, tmp_path / "new")
    assert [path.name for path in paths] == [
        "loss_traces.png",
        "running_llc.png",
        "token_loss_shift.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    settled = figures.save_figures(tree, tmp_path / "settled", burn_in=4)
    for before, after in zip(paths, settled, strict=True):
        assert before.read_bytes() != after.read_bytes()
    bare = xr.DataTree(tree.dataset.drop_vars([f"loss_{name}" for name in NAMES]))
    assert len(figures.save_figures(bare, tmp_path)) == 2


def test_neither_pyplot_nor_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, xarray as xr\n"
        "from basinscope.report.figures import loss_traces\n"
        "assert 'matplotlib' not in sys.modules\n"
        "trace = (('chain', 'step'), np.ones((2, 3)))\n"
        "llc = xr.Dataset({'loss_trace': trace, 'init_loss': 1.0, 'n_beta': 1.0})\n"
        f"loss_traces(llc).savefig({str(tmp_path / 'a.png')!r})\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
