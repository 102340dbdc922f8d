"""A change of the served model, as it can be watched."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """What a change is doing, or how it ended."""

    CHECKING = "checking"
    LOADING = "loading"
    DRAINING = "draining"
    UNLOADING = "unloading"
    RESTORING = "restoring"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Change:
    """From the model `source` (None at start-up) to `target`. Written by the event loop, read by anyone.

    `beside`: both were in memory for a while, and no request waited. `num_cut` requests did not finish in
    time. Times are in seconds.
    """

    source: str | None
    target: str
    phase: Phase = Phase.CHECKING
    beside: bool = False
    num_cut: int = 0
    error: str | None = None
    progress: tuple[str, int, int] | None = None
    _began: float = field(default_factory=time.monotonic)
    _turned: float = field(default_factory=time.monotonic)
    _took: dict[str, float] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether it is over, one way or the other."""
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def seconds(self) -> float:
        """How long it takes so far, or took."""
        return (self._turned if self.has_ended else time.monotonic()) - self._began

    def turn(self, phase: Phase) -> None:
        """The next phase begins."""
        now = time.monotonic()
        self._took[self.phase] = self._took.get(self.phase, 0.0) + now - self._turned
        self._turned = now
        self.phase = phase

    def fail(self, error: object) -> None:
        """It ended by `error`."""
        self.error = str(error)
        self.turn(Phase.FAILED)

    def on_progress(self, what: str, done: int, total: int) -> None:
        """See `Progress`."""
        self.progress = (what, done, total)

    def describe(self) -> dict[str, Any]:
        """For the admin routes."""
        return {
            "from": self.source,
            "to": self.target,
            "phase": self.phase.value,
            "beside": self.beside,
            "cut_requests": self.num_cut,
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(seconds, 3) for phase, seconds in self._took.copy().items()},
            "error": self.error,
        }
