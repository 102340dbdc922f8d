"""How attention of mlx-lm's models comes to our caches.

Their layers call `scaled_dot_product_attention`, a function that each model's module imports by name, with
the cache beside K and V. It has one layout for a whole batch and one number of bits for K and V. With ours in
its place sequences of any lengths stand in a batch, and join and leave it without moving the others. For
every other cache it is the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn import Module

from dormouse.runtimes.mlx import lm
from dormouse.runtimes.mlx.layer_cache import LayerCache

_NAME = "scaled_dot_product_attention"


def route_attention(model: Module) -> None:
    """Put ours in the place of that function in all modules that the model's layers come from. Idempotent."""
    original = lm.base.scaled_dot_product_attention
    routed = _routed(original)
    for module in _modules_of(model):
        if getattr(module, _NAME, None) is original:
            setattr(module, _NAME, routed)


def _modules_of(model: Module) -> set[ModuleType]:
    names = {kind.__module__ for layer in model.modules() for kind in type(layer).__mro__}
    return {sys.modules[name] for name in names if name in sys.modules and name != lm.base.__name__}


def _routed(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @wraps(original)
    def scaled_dot_product_attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: object,
        scale: float,
        mask: object,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if isinstance(cache, LayerCache) and cache.is_routed:
            return cache.attend(queries, scale, mask, sinks)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return scaled_dot_product_attention
