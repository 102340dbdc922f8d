"""A model in two halves, so that logits are computed of the rows that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Hidden = Callable[..., mx.array]
Logits = Callable[[mx.array], mx.array]


def halves(module: nn.Module) -> tuple[Hidden, Logits] | None:
    """What computes the rows behind the last layer, and what makes logits of them, where both are found.

    Whether together they are the model is for the probe to see: some scale or cap their logits.
    """
    inner: Any = getattr(module, "model", None)
    if not callable(inner):
        return None
    head = getattr(module, "lm_head", None)
    if not callable(head):
        head = getattr(getattr(inner, "embed_tokens", None), "as_linear", None)
    return (inner, head) if callable(head) else None
