"""Coefficients of the float32 functions behind the Gaussian noise, shared by all compiled paths.

Own Chebyshev fits, lowest power first, each at or below 3e-8 relative error before rounding:

- ``LOG``: -2 ln(1 + f) = -2 f + f^2 LOG(f) for 1 + f in [sqrt(1/2), sqrt(2));
- ``SIN``: sin(2 pi r) = r SIN(r^2) and ``COS``: cos(2 pi r) = COS(r^2) for |r| <= 1/8.
"""

from __future__ import annotations

LOG = (
    0.9999999403953552,
    -0.6666664481163025,
    0.5000154376029968,
    -0.4000393748283386,
    0.3325519859790802,
    -0.2837800085544586,
    0.262032687664032,
    -0.25643497705459595,
    0.1573333591222763,
)
SIN = (
    6.2831854820251465,
    -41.34170150756836,
    81.6052017211914,
    -76.69786834716797,
    41.47289276123047,
)
COS = (1.0, -19.739208221435547, 64.93931579589844, -85.4428482055664, 59.22028732299805)

SQRT_HALF_BITS = 0x3F3504F3  # the float32 nearest to sqrt(1/2), as an integer
MINUS_TWO_LN_TWO = -1.3862943611198906
