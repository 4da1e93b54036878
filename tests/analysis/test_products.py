"""Products of traces, in one piece or in halves."""

from __future__ import annotations

import numpy as np
import pytest

from basinscope.analysis import products


@pytest.mark.parametrize("small", [0, 2**23])
@pytest.mark.parametrize("with_itself", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_every_row_is_multiplied(
    rows: int, with_itself: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALL_PRODUCT", small)
    a = np.random.default_rng(0).standard_normal((rows, 6))
    b = a if with_itself else np.random.default_rng(1).standard_normal((4, 6))
    out = np.full((rows, len(b)), np.nan)
    assert products.product(a, b, out=out) is out
    np.testing.assert_allclose(out, np.einsum("is,js->ij", a, b), rtol=0, atol=1e-12)
