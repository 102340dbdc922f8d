"""Counts of model swaps, for whoever shows them."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class SwapOutcome(StrEnum):
    """How a swap ended."""

    DONE = "done"
    REFUSED = "refused"
    """Found impossible before anything was touched."""
    ROLLED_BACK = "rolled_back"
    """Failed on the way; the old model serves again."""
    FAILED = "failed"
    """Failed, and the old model did not come back either."""


class SwapCounts:
    """Since the server started. For one thread that counts and any that read."""

    def __init__(self) -> None:
        self._counts: Counter[SwapOutcome] = Counter()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """What the swaps that were done took, in all."""
        return self._seconds

    def done(self, seconds: float) -> None:
        """A swap took `seconds`; the new model serves."""
        self._counts[SwapOutcome.DONE] += 1
        self._seconds += seconds

    def refused(self) -> None:
        """A swap was found impossible; nothing was touched."""
        self._counts[SwapOutcome.REFUSED] += 1

    def rolled_back(self) -> None:
        """A swap failed; the old model serves again."""
        self._counts[SwapOutcome.ROLLED_BACK] += 1

    def failed(self) -> None:
        """A swap failed, and so did going back."""
        self._counts[SwapOutcome.FAILED] += 1

    def by_outcome(self) -> dict[SwapOutcome, int]:
        """All counts, also those that are 0."""
        return {outcome: self._counts[outcome] for outcome in SwapOutcome}
