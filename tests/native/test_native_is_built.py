"""Where there is a compiler there are native kernels: a build that failed must not pass for a choice."""

from __future__ import annotations

import importlib.util
import shutil


def test_a_compiler_means_native_kernels() -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    built = importlib.util.find_spec("dormouse._native") is not None
    assert built or compiler is None, f"{compiler} is here, but dormouse._native was not built; make install"
