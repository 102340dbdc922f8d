"""What a constraint allows, as something to add to logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.constraint import Constraint
from dormouse.engine.distribution import Row

Words = NDArray[np.uint32]
"""A mask of a vocabulary: token `i` is bit `i % 32` of word `i // 32`."""

_WORD_BITS = 32

_PENALTIES = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
).astype(np.float32)
"""For each byte of a mask what its eight tokens get: a table is ten times faster than a choice per token."""


def allowed_by(constraint: Constraint, vocab_size: int) -> Words:
    """One bit per token that may come next."""
    words = np.zeros(-(-vocab_size // _WORD_BITS), "<u4")
    constraint.fill_mask(words.data)
    return words


def only_one(words: Words) -> int | None:
    """The token, if exactly one may come next."""
    places = words.nonzero()[0]
    if len(places) != 1:
        return None
    word = int(words[places[0]])
    return int(places[0]) * _WORD_BITS + word.bit_length() - 1 if word.bit_count() == 1 else None


def penalty(words: Words, vocab_size: int) -> Row:
    """0 for tokens that may come next, -inf for all others."""
    # `take` is six times faster than an index of the same meaning.
    row: Row = np.take(_PENALTIES, words.view(np.uint8), axis=0).reshape(-1)[:vocab_size]
    return row
