"""Requests that wait for a model: who for what, since when, and what wakes them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dormouse.domain.errors import DormouseError, QueueFull
from dormouse.domain.places import Places


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    target: str | None
    arrived: float
    woken: asyncio.Future[None]


class WaitingRoom:
    """Of the event loop. Times are the loop's own, in seconds; target None is whatever is served."""

    def __init__(self, max_waiting: int) -> None:
        self._places = Places(max_waiting)
        self._waiters: list[_Waiter] = []

    @property
    def counts(self) -> dict[str, int]:
        """How many wait for each model; `*` for whatever is served. For any thread."""
        return dict(Counter(waiter.target or "*" for waiter in self._waiters.copy()))

    def longest_awaited(self, besides: str | None) -> str | None:
        """The model whose first request has waited the longest; `besides` is no answer."""
        wanted = [w for w in self._waiters if w.target is not None and w.target != besides]
        return min(wanted, key=lambda waiter: waiter.arrived).target if wanted else None

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place for one that waits, however often he is woken. Raises QueueFull if he gets none."""
        if not self._places.take(tenant):
            raise QueueFull(f"{len(self._places)} requests wait for a model already; retry later")
        try:
            yield
        finally:
            self._places.give_back(tenant)

    async def wait(self, target: str | None, arrived: float, until: float) -> bool:
        """Wait to be woken; False when it got too late. Raises the error of `refuse`."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(target, arrived, loop.create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter.woken, max(0.0, until - loop.time()))
        except TimeoutError:
            return False
        finally:
            self._waiters.remove(waiter)
        return True

    def wake(self) -> None:
        """Something has changed: everybody looks again."""
        for waiter in self._waiters:
            if not waiter.woken.done():
                waiter.woken.set_result(None)

    def refuse(self, target: str, error: DormouseError) -> None:
        """The model cannot be had: those who wait for it get the error."""
        for waiter in self._waiters:
            if waiter.target == target and not waiter.woken.done():
                waiter.woken.set_exception(error)
