"""Which kernels a device gets: native ones where they are built, else the reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dormouse.domain.cache_spec import CacheSpec
from dormouse.domain.errors import ModelError
from dormouse.runtimes.torch import row_ops
from dormouse.runtimes.torch.decoder import Decoder
from dormouse.runtimes.torch.kernels import Kernels, RowOps
from dormouse.runtimes.torch.layers import Layer, LayerOps, PlainLayer
from dormouse.runtimes.torch.linear import Linear, make_linear
from dormouse.runtimes.torch.reference import ReferenceKernels

NATIVE_MODULE = "dormouse._native"
NATIVE_FRONT = "dormouse.runtimes.torch.native"
NATIVE_LAYER = "dormouse.runtimes.torch.native_layer"
QUANTIZED_LINEAR = "dormouse.runtimes.torch.quantized_linear"
NO_NATIVE = "DORMOUSE_NO_NATIVE"
WEIGHTS = ("auto", "bf16", "int8", "int4")
"""How weights are held: `bf16` in the dtype of the computation, `auto` in the fewest bits that will do."""


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


def linear_maker(weights: str, device: torch.device) -> Callable[[Tensor, Tensor | None], Linear]:
    """What makes a linear layer of a `[out, in]` weight and its bias; `weights` is one of `WEIGHTS`.

    Raises ModelError for a name that is not, and for quantized weights where there are no native kernels.
    """
    if weights not in WEIGHTS:
        raise ModelError(f"weights {weights!r} are not known; use one of {', '.join(WEIGHTS)}")
    has_native = _native(device) is not None
    if weights == "bf16" or (weights == "auto" and not has_native):
        return make_linear
    if not has_native:
        raise ModelError(
            f"--weights {weights} needs the native kernels, and here it is {describe_kernels(device)}; "
            "use --weights auto"
        )
    maker: Callable[[Tensor, Tensor | None], Linear] = importlib.import_module(QUANTIZED_LINEAR).MAKERS[
        weights
    ]
    return maker


def bind_layers(decoder: Decoder, cache: CacheSpec, kernels: Kernels, ops: RowOps) -> tuple[LayerOps, ...]:
    """The decoder's layers with their kernels; whole layers are native where all that they use is."""
    return tuple(
        _bind_layer(index, layer, decoder, cache, kernels, ops) for index, layer in enumerate(decoder.layers)
    )


def _bind_layer(
    index: int, layer: Layer, decoder: Decoder, cache: CacheSpec, kernels: Kernels, ops: RowOps
) -> LayerOps:
    config = decoder.config
    table = None if layer.rope is None else decoder.rope_tables[layer.rope]
    if not isinstance(kernels, ReferenceKernels) and ops is not row_ops:
        native_layer = importlib.import_module(NATIVE_LAYER).NativeLayer
        if native_layer.fits(layer):
            bound: LayerOps = native_layer(index, layer, config, table, cache)
            return bound
    return PlainLayer(index, layer, config, table, kernels, ops)


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
