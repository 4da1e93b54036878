"""What the table, the notes and the figure of several LLCs say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.container import ErrorbarContainer

from basinscope.report.comparison import (
    comparison_figure,
    comparison_figures,
    comparison_notes,
    comparison_table,
)
from tests.report.test_figures import line


def compared(names: list[Any], **changes: Any) -> xr.Dataset:
    """Make a comparison of three runs, of which the last is not paired with the others."""
    llc = np.array([10.0, 14.0, 13.0])
    paired = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    values: dict[str, Any] = {
        "llc_mean": llc, "llc_mcse": np.array([1.0, 2.0, np.nan]), "llc_drift": np.zeros(3),
        "llc_drift_mcse": np.ones(3), "rhat": np.array([1.0, 1.01, 1.2]), "ess_bulk": llc,
        "init_loss": np.array([3.0, 2.0, 1.0]), "n_beta": np.full(3, 30.0), **changes,
    }  # fmt: skip
    pairs = {"difference": llc[:, None] - llc, "difference_mcse": 1 - paired / 2, "paired": paired}
    return xr.Dataset(
        {name: ("run", value) for name, value in values.items()}
        | {name: (("run", "other_run"), value) for name, value in pairs.items()},
        {"run": names, "other_run": names},
    )


def test_a_change_is_from_the_run_before() -> None:
    records = comparison_figures(compared([0, 10, 20]))
    found = [(r["run"], r["change"], r["change_error"], r["paired"]) for r in records]
    assert found == [(0, None, None, None), (10, 4.0, 0.5, True), (20, -1.0, 1.0, False)]
    cells = [list(column.cells) for column in comparison_table(compared([0, 10, 20])).columns]
    assert cells[0] == ["0", "10", "20"]
    assert cells[2] == ["10.00 ± 1.00", "14.00 ± 2.00", "13.00 ± ?"]
    assert cells[3] == ["", "+4.00 ± 0.50", "-1.00 ± 1.00 *"]


def test_notes_say_what_not_to_trust() -> None:
    notes = " ".join(comparison_notes(compared(["a", "b", "c"])))
    assert "saw the same batches" in notes
    assert "did not see the same batches" in notes
    assert "have not arrived" not in notes
    assert "n_beta" not in notes
    moving = compared(["a", "b", "c"], llc_drift=np.array([0, -3.1, 2.9]))
    assert "Chains have not arrived, by their drift: b." in " ".join(comparison_notes(moving))
    assert "A negative LLC" not in " ".join(notes)
    descending = compared(["a", "b", "c"], llc_mean=np.array([10.0, -6.1, 13.0]))
    assert "A negative LLC says that chains went down" in " ".join(comparison_notes(descending))
    mixed = compared(["a", "b", "c"], n_beta=np.array([30.0, 30.0, 31.0]))
    assert "Runs differ in n_beta" in comparison_notes(mixed)[-1]
    alike = compared(["a", "b", "c"]).isel(run=[0, 1], other_run=[0, 1])
    assert "*" not in " ".join(comparison_notes(alike))


@pytest.mark.parametrize(
    ("names", "scale"),
    [([1, 10, 100], "log"), ([0, 10, 1000], "symlog"), ([80, 90, 100], "linear")],
)
def test_runs_with_numbers_lie_along_them(names: list[int], scale: str) -> None:
    figure = comparison_figure(compared(names))
    above, below = figure.axes
    assert above.get_xscale() == below.get_xscale() == scale
    (bars,) = (c for c in above.containers if isinstance(c, ErrorbarContainer))
    drawn = bars.lines[0]
    assert drawn is not None
    np.testing.assert_array_equal(drawn.get_xdata(), names)
    np.testing.assert_array_equal(drawn.get_ydata(), [10, 14, 13])
    np.testing.assert_array_equal(line(figure, "loss"), [3, 2, 1])


def test_other_runs_stand_beside_each_other_by_name() -> None:
    below = comparison_figure(compared(["small", "middle", "large"])).axes[1]
    assert [label.get_text() for label in below.get_xticklabels()] == ["small", "middle", "large"]
