"""The store's clock: Unix time that is never set back while the store is open."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock


class SteadyClock:
    """Follows the machine's clock, but goes on from where it was when that is set back.

    What was used last is what was used at the greatest time, so the order of uses has to survive a clock that
    is mended. Thread-safe.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = Lock()
        self._ahead_s = 0.0
        self._last = wall()

    def __call__(self) -> float:
        """Unix seconds, never less than before."""
        with self._lock:
            now = self._wall() + self._ahead_s
            if now < self._last:
                self._ahead_s += self._last - now
                now = self._last
            self._last = now
            return now
