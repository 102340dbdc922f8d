"""Which kernels a device gets: native ones where they are built, else the reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch

from dormouse.domain.cache_spec import CacheSpec
from dormouse.runtimes.torch import row_ops
from dormouse.runtimes.torch.kernels import Kernels, RowOps
from dormouse.runtimes.torch.reference import ReferenceKernels

NATIVE_MODULE = "dormouse._native"
NATIVE_FRONT = "dormouse.runtimes.torch.native"
NO_NATIVE = "DORMOUSE_NO_NATIVE"


def describe_kernels(device: torch.device) -> str:
    """Which kernels `device` gets and why, for people: begins with `native` or with `reference`."""
    if (native := _native(device)) is not None:
        return f"native ({native.isa()})"
    if device.type != "cpu":
        return f"reference: there are no native kernels for {device.type}"
    if os.environ.get(NO_NATIVE):
        return f"reference: {NO_NATIVE} is set"
    return "reference: this installation has no native module (no C++ compiler when it was installed)"


def load_kernels(cache: CacheSpec, device: torch.device) -> Kernels:
    """The native kernels on a CPU whose build has them, else the reference."""
    native = _native(device)
    fits = native and all(
        dim % native.HEAD_ALIGNMENT == 0 and dim <= native.MAX_HEAD_DIM
        for dim in (cache.k_head_dim, cache.v_head_dim)
    )
    kernels: Kernels = native.NativeKernels(cache) if fits else ReferenceKernels(cache)
    return kernels


def load_row_ops(widths: Iterable[int], device: torch.device) -> RowOps:
    """The native operations where there are any for rows of all `widths`, else torch's."""
    native = _native(device)
    if native and all(width % native.HEAD_ALIGNMENT == 0 for width in widths):
        ops: RowOps = native
        return ops
    return row_ops


def _native(device: torch.device) -> Any:
    """The native front, or None where it is not built, not for this device, or not wanted.

    `DORMOUSE_NO_NATIVE` set to anything asks for the reference. A native module that is there but does not
    load is an error (ImportError), not a slow server.
    """
    if device.type != "cpu" or os.environ.get(NO_NATIVE):
        return None
    if not all(importlib.util.find_spec(name) for name in (NATIVE_MODULE, NATIVE_FRONT)):
        return None
    return importlib.import_module(NATIVE_FRONT)
