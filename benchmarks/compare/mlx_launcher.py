"""Start a server built on mlx with MKL's matrix products; runs in that server's own environment.

`mlx_launcher.py mlx_lm.server --model ...` is `python -m mlx_lm.server --model ...`. mlx's wheel for Linux
links the reference BLAS: 3 GFLOP/s on a machine that has 250 in fp32. Symbols of a library that was loaded
globally before come first, so loading MKL is all that it takes; without it mlx would be no fair peer. On
a Mac mlx brings what it needs, and nothing is loaded.
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Load MKL for all, then be the module that the first argument names."""
    if sys.platform == "linux":
        libraries = sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
        if not libraries:
            raise SystemExit(f"no libmkl_rt below {sys.prefix}; run `make peers` again")
        ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
