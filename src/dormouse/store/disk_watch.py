"""What the disk below the data folder is like. A look at a network drive that hangs does not return."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock, Thread

_PATIENCE_S = 0.1
"""A look takes microseconds; whoever asks may be the event loop."""


@dataclass(frozen=True, slots=True)
class Disk:
    """`free_nbytes` of it, and whether the data folder still is the one that was opened."""

    free_nbytes: int
    is_in_place: bool


class DiskWatch:
    """Looks from a thread of its own, one look at a time."""

    def __init__(self, look: Callable[[], Disk]) -> None:
        """`look` may raise OSError, and may never return."""
        self._look = look
        self._lock = Lock()
        self._answer: Future[Disk] | None = None
        self._asked_at = 0.0

    def look(self) -> Disk | None:
        """None when the disk does not answer. Raises OSError when the folder cannot be looked at."""
        with self._lock:
            if self._answer is None or self._answer.done():
                self._answer = Future()
                self._asked_at = time.monotonic()
                Thread(target=self._run, args=(self._answer,), name="disk-watch", daemon=True).start()
            answer, until = self._answer, self._asked_at + _PATIENCE_S
        try:
            return answer.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            if answer.done():
                return answer.result()
            return None

    def _run(self, answer: Future[Disk]) -> None:
        try:
            answer.set_result(self._look())
        except Exception as error:  # noqa: BLE001  (it is raised where the answer is read)
            answer.set_exception(error)
