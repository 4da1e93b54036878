"""What tables say of results."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from basinscope.report.tables import influence_pairs


@pytest.mark.parametrize(
    ("rows", "columns", "found"),
    [
        ([0, 1, 2], [0, 1, 2], [(0, 1), (0, 2), (1, 2)]),
        ([5], [0, 2], [(5, 0), (5, 2)]),  # no side holds the other's
        ([2, 1], [1, 3], [(1, 3), (2, 1), (2, 3)]),
    ],
)
def test_every_pair_of_sequences_is_listed_once(
    rows: list[int], columns: list[int], found: list[tuple[int, int]]
) -> None:
    values = np.full((len(rows), len(columns)), 0.5, np.float32)
    influences = xr.Dataset(
        {"influences": (("batch_1", "batch_2"), values)}, {"batch_1": rows, "batch_2": columns}
    )
    pairs = influence_pairs(influences, 10)
    assert sorted((pair["batch_1"], pair["batch_2"]) for pair in pairs) == found
