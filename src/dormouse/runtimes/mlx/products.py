"""Whether products of matrices come out right on this machine."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from dormouse.domain.errors import ModelError

_ROWS, _INNER, _COLUMNS = 8, 576, 1536
"""Large enough for several threads."""


def check_products() -> None:
    """Hold one product against NumPy's. Raises ModelError when they differ.

    On Linux the products come from what else the process has loaded; two OpenMP libraries that answer each
    other's calls gave wrong ones without a word.
    """
    random = np.random.default_rng(0)
    left = random.standard_normal((_ROWS, _INNER)).astype(np.float32)
    right = random.standard_normal((_COLUMNS, _INNER)).astype(np.float32)
    got = np.array(mx.array(left) @ mx.array(right).T)
    error = float(np.abs(got - left @ right.T).max())
    if error > 0.05:
        raise ModelError(
            f"products of matrices are wrong under mlx here, by {error:.3g}: another library in this process "
            "stands in its way; pip uninstall mkl, or run without what else was loaded"
        )
