"""The matrix products of MLX's Linux build: it links a reference BLAS, and takes a fast one that is there."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_LIBRARY = "libmkl_rt.so"
_OPENMP = "libgomp.so.1"
_SEQUENTIAL, _GNU_THREADS = 1, 3
"""MKL on the OpenMP that torch has, too. With Intel's own, torch's in the same process answers half of its
calls, and products of more than one row come out wrong, silently."""

_REPRODUCIBLE = 2
"""MKL_CBWR_AUTO: where an array lies in memory does not change the bits of a product."""


def load_blas() -> bool:
    """Put MKL's symbols before those that MLX is linked with; True where that was done.

    Must come before mlx is imported. Elsewhere than on Linux MLX brings what it needs.
    """
    if sys.platform != "linux":
        return False
    path = _library()
    if path is None:
        log.warning(
            "mlx computes with its reference BLAS, about 40 times slower than it could: pip install mkl"
        )
        return False
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.MKL_Set_Threading_Layer(_GNU_THREADS if _load_openmp() else _SEQUENTIAL)
    library.MKL_CBWR_Set(_REPRODUCIBLE)
    return True


def set_threads(threads: int) -> bool:
    """Let MKL compute on that many threads; False where there is no MKL to tell."""
    library = _mkl()
    if library is None:
        return False
    library.MKL_Set_Num_Threads(threads)
    return True


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Products in here start no threads, so that none are left behind (see `stream.py`)."""
    library = _mkl()
    if library is None:
        yield
        return
    threads = library.MKL_Get_Max_Threads()
    library.MKL_Set_Num_Threads(1)
    try:
        yield
    finally:
        library.MKL_Set_Num_Threads(threads)


def _mkl() -> ctypes.CDLL | None:
    path = _library() if sys.platform == "linux" else None
    return None if path is None else ctypes.CDLL(str(path))


def _load_openmp() -> bool:
    """Whether there is one; MKL ends the process when it looks for one in vain."""
    try:
        ctypes.CDLL(_OPENMP, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        log.warning("mlx computes on one thread: %s is not installed", _OPENMP)
        return False
    return True


def _library() -> Path | None:
    """Where the package `mkl` has put its library; it has no module that could be asked."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name.startswith(_LIBRARY))
    return next((path for path in found if path.is_file()), None)
