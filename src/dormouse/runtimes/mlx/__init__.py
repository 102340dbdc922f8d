"""The MLX runtime: mlx-lm's models over the pages of the one format."""

from dormouse.runtimes.mlx.blas import load_blas

# Before any import of mlx, which takes the products of matrices from what the process has by then.
load_blas()
