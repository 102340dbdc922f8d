"""Progress of long work, told to whoever started it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often, from the thread that does the work; must be quick and must not raise."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `what` (such as `downloading smollm2`) are finished."""


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that do not watch."""
