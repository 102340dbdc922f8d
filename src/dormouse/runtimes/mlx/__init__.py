"""The MLX runtime: mlx-lm's models over the pages of the one format."""

import os

from dormouse.runtimes.mlx.blas import load_blas

# Read by libgomp when MKL loads it; see runtimes/torch/__init__.py: beside other busy processes a worker that
# spins at a barrier burns the time that the worker it waits for would need.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Before any import of mlx, which takes the products of matrices from what the process has by then.
load_blas()
