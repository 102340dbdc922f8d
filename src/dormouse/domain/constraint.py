"""What a reply may consist of, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Constraint(Protocol):
    """The state of one reply's grammar. Owned by the engine thread once its request is submitted."""

    def fill_mask(self, mask: memoryview) -> None:
        """Set the bits of the tokens that may come next, end-of-turn tokens included; clear the others.

        `mask` has `ceil(vocab_size / 32)` writable 32-bit words; token `i` is bit `i % 32` of word `i // 32`.
        """

    def took(self, token: int) -> bool:
        """`token` came next. False when the grammar is broken by it, or by an error of its own."""

    def forced(self) -> Sequence[int]:
        """Tokens that can only come next, in order; none where there is a choice."""
