"""The bounds of MLX's own allocator."""

from __future__ import annotations

import mlx.core as mx

CACHE_NBYTES = 256 << 20
"""Freed memory that MLX keeps for its next arrays: a step's, not a long prompt's."""


def bound_memory() -> None:
    """Bound what MLX keeps; on Metal hold what is in use in memory, up to what the device recommends."""
    mx.set_cache_limit(CACHE_NBYTES)
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
