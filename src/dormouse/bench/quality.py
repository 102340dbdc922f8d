"""What a KV format costs in quality: the perplexity of a text, read through the quantized cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dormouse.domain.plan import Chunk, Plan
from dormouse.runtimes.base import Logits, Runtime


def perplexity(
    runtime: Runtime,
    tokens: Sequence[int],
    *,
    window: int,
    chunk_tokens: int,
    on_tokens: Callable[[int], None],
) -> float:
    """exp of the mean negative log likelihood of `tokens`, in windows of `window` tokens each.

    Windows do not overlap: every token but a window's first is predicted from all before it in the
    window. `on_tokens` hears how many tokens were read so far. Raises ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError("a text of at least two tokens is needed")
    pages = tuple(range(-(-window // runtime.cache.block_size)))
    total, count = 0.0, 0
    for begin in range(0, len(tokens) - 1, window):
        piece = tokens[begin : begin + window]
        for start in range(0, len(piece), chunk_tokens):
            run = tuple(piece[start : start + chunk_tokens])
            used = pages[: -(-(start + len(run)) // runtime.cache.block_size)]
            logits = runtime.forward(Plan((Chunk(run, start, used, len(run)),)))
            targets = piece[start + 1 : start + 1 + len(run)]
            total += _negative_log_likelihood(logits[: len(targets)], targets)
            count += len(targets)
            on_tokens(begin + start + len(run))
    return math.exp(total / count)


def _negative_log_likelihood(logits: Logits, targets: Sequence[int]) -> float:
    """Sum over rows of -log softmax(row)[target]."""
    peak = logits.max(axis=1, keepdims=True)
    normalizers = np.log(np.exp(logits - peak).sum(axis=1, dtype=np.float64)) + peak[:, 0]
    return float((normalizers - logits[np.arange(len(targets)), list(targets)]).sum())
