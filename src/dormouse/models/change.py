"""Changes of the served model: one at a time, each as it can be watched."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dormouse.domain.errors import ShuttingDown
from dormouse.models.swap_counts import SwapCounts

log = logging.getLogger(__name__)


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
    time. `is_lost`: the old model did not come back either. Times are in seconds.
    """

    source: str | None
    target: str
    phase: Phase = Phase.CHECKING
    beside: bool = False
    num_cut: int = 0
    is_lost: bool = False
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
        what, done, total = self.progress or ("", 0, 0)
        return {
            "from": self.source,
            "to": self.target,
            "phase": self.phase.value,
            "beside": self.beside,
            "cut_requests": self.num_cut,
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(seconds, 3) for phase, seconds in self._took.copy().items()},
            "progress": {"what": what, "done": done, "total": total} if what else None,
            "error": self.error,
        }


class Changes:
    """Runs changes to their end, whoever waits for them. Of the event loop, but for `wait_for_end`."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        """`on_end` is called after each of them."""
        self.last: Change | None = None
        self.counts = SwapCounts()
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None
        self._has_ended = threading.Event()
        self._has_ended.set()

    @property
    def is_running(self) -> bool:
        """Whether one is in progress."""
        return self.last is not None and not self.last.has_ended

    async def run(self, change: Change, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of `change`, also when the caller is cancelled. Raises what it raises."""
        self.last = change
        self._has_ended.clear()
        self._task = asyncio.create_task(self._to_the_end(change, work))
        # Its error is logged; nobody may be left who takes it.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._task)

    async def end(self) -> None:
        """Return when none is in progress."""
        if self._task is not None:
            await asyncio.wait({self._task})

    def wait_for_end(self, timeout_s: float) -> bool:
        """For other threads: block until none is in progress; False when that took too long."""
        return self._has_ended.wait(timeout_s)

    async def _to_the_end(self, change: Change, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
            change.turn(Phase.DONE)
            self._count(change, None)
            log.info("'%s' is served after %.1f s", change.target, change.seconds)
        except BaseException as error:
            self._count(change, error)
            change.fail(error)
            log.error("'%s' is not served: %s", change.target, error)
            raise
        finally:
            self._has_ended.set()
            self._on_end()

    def _count(self, change: Change, error: BaseException | None) -> None:
        if change.source is None or isinstance(error, ShuttingDown):
            return
        if error is None:
            self.counts.done(change.seconds)
        elif change.phase is Phase.CHECKING:
            self.counts.refused()
        elif change.is_lost:
            self.counts.failed()
        else:
            self.counts.rolled_back()
