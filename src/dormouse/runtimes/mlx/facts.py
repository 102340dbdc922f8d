"""What mlx is on this machine, for people."""

from __future__ import annotations

import sys
from importlib.metadata import version

import mlx.core as mx

from dormouse.runtimes.mlx.blas import load_blas


def describe_mlx() -> str:
    """Version, and what it computes on: Metal, or the CPU and whose matrix products."""
    if mx.metal.is_available():
        return f"{version('mlx')} on Metal ({mx.device_info()['device_name']})"
    return f"{version('mlx')} on the CPU, {_blas()}"


def _blas() -> str:
    if sys.platform != "linux":
        return "Accelerate"
    return "MKL" if load_blas() else "reference BLAS"
