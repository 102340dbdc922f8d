"""The crossing from the engine thread to the event loop: a request's events, in order."""

from __future__ import annotations

import asyncio
import contextlib

from dormouse.domain.requests import Event

PING_INTERVAL_S = 10.0
"""A stream shows a sign of life this often while it waits; clients and proxies give up on silence."""


class Sink:
    """Takes a request's events on the engine thread, hands them out on the event loop.

    Never blocks the engine: the queue is unbounded, and bounded in fact by the reply's `max_tokens`.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._peeked: Event | None = None

    def __call__(self, event: Event) -> None:
        """For the engine thread."""
        # The loop may have closed under a request that nobody awaits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None after `timeout_s` seconds without one."""
        if self._peeked is not None:
            event, self._peeked = self._peeked, None
            return event
        if not self._events.empty():
            return self._events.get_nowait()  # without a task and a timer for each event
        try:
            return await asyncio.wait_for(self._events.get(), timeout_s)
        except TimeoutError:
            return None

    async def peek(self, timeout_s: float) -> Event | None:
        """The next event, which stays the next one; None after `timeout_s` seconds without one."""
        if self._peeked is None:
            self._peeked = await self.next(timeout_s)
        return self._peeked
