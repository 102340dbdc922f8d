"""What a constraint allows, as something to add to logits."""

from __future__ import annotations

import numpy as np

from dormouse.domain.constraint import Constraint
from dormouse.engine.distribution import Row

_WORD_BITS = 32

_PENALTIES = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
).astype(np.float32)
"""For each byte of a mask what its eight tokens get: a table is ten times faster than a choice per token."""


def penalty(constraint: Constraint, vocab_size: int) -> Row:
    """0 for tokens that may come next, -inf for all others."""
    words = np.zeros(-(-vocab_size // _WORD_BITS), "<u4")
    constraint.fill_mask(words.data)
    return _PENALTIES[words.view(np.uint8)].reshape(-1)[:vocab_size]
