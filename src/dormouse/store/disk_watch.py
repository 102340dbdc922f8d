"""What the disk below the data folder is like. A look at a network drive that hangs does not return."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Lock, Thread

_WAIT_S = 0.02
"""A look takes microseconds; whoever asks may be the event loop."""

_STALLED_S = 2.0
"""A look that has been out for less may just not have had its turn on a busy machine."""


@dataclass(frozen=True, slots=True)
class Disk:
    """`free_nbytes` of it, and whether the data folder still is the one that was opened."""

    free_nbytes: int
    is_in_place: bool


class DiskWatch:
    """Looks from a thread of its own, one look at a time."""

    def __init__(self, look: Callable[[], Disk]) -> None:
        """`look` may raise OSError, and may never return; it is called once now."""
        self._look = look
        self._lock = Lock()
        self._last = look()
        self._answer: Future[Disk] | None = None
        self._asked_at = 0.0

    def look(self) -> Disk | None:
        """The disk now, or a moment ago if it takes its time; None when it does not answer.

        Raises OSError when the folder cannot be looked at.
        """
        with self._lock:
            if self._answer is None or self._answer.done():
                self._answer, self._asked_at = self._ask(), time.monotonic()
            answer, asked_at = self._answer, self._asked_at
        done, _ = wait([answer], _WAIT_S)
        if done:
            self._last = answer.result()
            return self._last
        return self._last if time.monotonic() - asked_at < _STALLED_S else None

    def _ask(self) -> Future[Disk]:
        answer: Future[Disk] = Future()
        Thread(target=self._run, args=(answer,), name="disk-watch", daemon=True).start()
        return answer

    def _run(self, answer: Future[Disk]) -> None:
        try:
            answer.set_result(self._look())
        except Exception as error:  # noqa: BLE001  (it is raised where the answer is read)
            answer.set_exception(error)
