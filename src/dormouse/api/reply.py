"""The crossing from the event loop to the engine thread and back: one request, its events, its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from fastapi import Request as HttpRequest

from dormouse.domain.requests import Event, Failed, Finished, Request
from dormouse.engine.engine import Engine

PING_INTERVAL_S = 10.0
"""A stream shows a sign of life this often while it waits; clients and proxies give up on silence."""


class Sink:
    """Takes a request's events on the engine thread, hands them out on the event loop.

    Never blocks the engine: the queue is unbounded, and bounded in fact by the reply's `max_tokens`.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def __call__(self, event: Event) -> None:
        """For the engine thread."""
        # The loop may have closed under a request that nobody awaits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None after `timeout_s` seconds without one."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout_s)
        except TimeoutError:
            return None


async def events(engine: Engine, request: Request, sink: Sink) -> AsyncGenerator[Event | None, None]:
    """The events of a submitted `request`, with None in every long silence.

    Aborts the request when the iteration ends early, as it does when the client goes away.
    """
    ended = False
    try:
        while not ended:
            event = await sink.next(PING_INTERVAL_S)
            ended = isinstance(event, Finished | Failed)
            yield event
    finally:
        if not ended:
            engine.abort(request.id)


async def gather(engine: Engine, request: Request, sink: Sink, http: HttpRequest) -> list[Event] | None:
    """All events of a submitted `request`; None, after aborting it, when the client goes away.

    Raises the error of a failed reply.
    """
    collected: list[Event] = []

    async def collect() -> None:
        async with contextlib.aclosing(events(engine, request, sink)) as stream:
            async for event in stream:
                if isinstance(event, Failed):
                    raise event.error
                if event is not None:
                    collected.append(event)

    reply = asyncio.create_task(collect())
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            return None
        await reply
        return collected
    finally:
        reply.cancel()
        gone.cancel()
        await asyncio.gather(reply, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
