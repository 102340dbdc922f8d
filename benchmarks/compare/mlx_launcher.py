"""Start `mlx_lm.server` with MKL's matrix products; runs in mlx's own environment.

mlx's wheel for Linux links the reference BLAS: 3 GFLOP/s on a machine that has 250 in fp32. Symbols of a
library that was loaded globally before come first, so loading MKL is all that it takes; without it mlx
would be no fair peer.
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Load MKL for all, then be `mlx_lm.server` on the processor."""
    libraries = sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    if not libraries:
        raise SystemExit(f"no libmkl_rt below {sys.prefix}; run `make peers` again")
    ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)
    runpy.run_module("mlx_lm.server", run_name="__main__")


if __name__ == "__main__":
    main()
