"""Threads that render and tokenize prompts, or compile grammars, and yield to the engine while they do."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

from dormouse.domain.errors import PromptStalled, QueueFull, Unavailable
from dormouse.domain.places import Places

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_CORES_PER_THREAD, _MOST_THREADS = 2, 4
"""A decode step waits at every product for the slowest of its threads: leave it cores without company."""

_NICE = 10
"""A prompt can wait a little, a step cannot: it gets a tenth of a core that both want. Not less, since a
thread that does not get to run may hold Python's lock."""

_ROOM = 512
"""Calls that are made or wait, of one tenant: a flood ends here, not with the memory."""

_MOST_STUCK = 2
"""So many threads that do not come back are replaced."""

_CLOSE_S = 10.0


@dataclass(slots=True, eq=False)
class _Call:
    tenant: str
    make: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)
    is_abandoned: bool = False


class Workers:
    """A few threads of lower priority, apart from the event loop's own, which wait for disks.

    Tenants take turns, calls of one tenant are made in their order. Nobody waits longer than `timeout_s`
    seconds. A thread cannot be stopped: one whose call takes longer is left to itself, and replaced, so that
    one prompt does not hold up all others; a few of them at most.
    """

    def __init__(self, what: str, timeout_s: float, num_threads: int | None = None) -> None:
        """`what` is made, for error messages; by default a thread for every other core, four at most."""
        self._what = what
        self._timeout_s = timeout_s
        self._num_threads = num_threads or min(
            _MOST_THREADS, max(1, (os.cpu_count() or 1) // _CORES_PER_THREAD)
        )
        self._places = Places(_ROOM)
        self._waiting: OrderedDict[str, deque[_Call]] = OrderedDict()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_working = 0
        self._num_stuck = 0
        self._is_closed = False

    @property
    def num_stuck(self) -> int:
        """Calls that were given up and have not returned."""
        return self._num_stuck

    async def run(self, tenant: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)` on one of the threads. Raises what it raises.

        If the caller is cancelled before its turn, the call is never made. Raises QueueFull when too many
        wait, PromptStalled when it is not made in time. For one event loop.
        """
        if not self._places.take(tenant):
            raise QueueFull(f"{len(self._places)} prompts are being made; retry later", retry_after_s=5)
        # With the caller's context, which tells logs whose request it is.
        make = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
        call = _Call(tenant, make)
        try:
            self._submit(call)
            made: T = await asyncio.wait_for(asyncio.wrap_future(call.result), self._timeout_s)
            return made
        except TimeoutError:
            if call.result.done() and not call.result.cancelled():
                raise  # its own
            raise PromptStalled(self._what, self._timeout_s, has_begun=self._abandon(call)) from None
        finally:
            self._forget(call)
            self._places.give_back(tenant)

    def close(self) -> None:
        """End the threads; calls that wait are dropped, those that run are waited for, but not for long.
        Idempotent."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            threads = [] if self._num_stuck else self._threads
        for thread in threads:
            thread.join(_CLOSE_S)

    def _submit(self, call: _Call) -> None:
        """Queue a call. Raises Unavailable when there is no thread to make it."""
        with self._changed:
            if self._num_working < self._num_threads and self._num_stuck <= _MOST_STUCK:
                self._start()
            if not self._num_working and not self._num_stuck:
                raise Unavailable("the system starts no more threads; retry later", retry_after_s=5)
            self._waiting.setdefault(call.tenant, deque()).append(call)
            self._changed.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="prompts", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.error("no thread for prompts could be started: %s", error)
            return
        self._num_working += 1
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]

    def _abandon(self, call: _Call) -> bool:
        """Nobody waits for it any more; whether it has begun. Then another thread takes over."""
        with self._changed:
            if not call.result.running():
                return False
            call.is_abandoned = True
            self._num_stuck += 1
            self._num_working -= 1
            log.error("%s was given up after %g s; it goes on", self._what, self._timeout_s)
            if self._num_stuck <= _MOST_STUCK:
                self._start()
            return True

    def _forget(self, call: _Call) -> None:
        with self._changed:
            calls = self._waiting.get(call.tenant, deque())
            if call in calls:
                calls.remove(call)
                if not calls:
                    del self._waiting[call.tenant]

    # -- the threads -----------------------------------------------------------------------------

    def _work(self) -> None:
        _yield_to_others()
        while (call := self._next()) is not None:
            _make(call)
            if call.is_abandoned and not self._come_back():
                return

    def _next(self) -> _Call | None:
        """The next call of the tenant whose turn it is; None at the end."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            tenant, calls = self._waiting.popitem(last=False)
            call = calls.popleft()
            if calls:
                self._waiting[tenant] = calls
            return call

    def _come_back(self) -> bool:
        """Whether this thread, which was given up, is needed again."""
        with self._changed:
            self._num_stuck -= 1
            if self._num_working >= self._num_threads:
                return False
            self._num_working += 1
            return True


def _make(call: _Call) -> None:
    if not call.result.set_running_or_notify_cancel():
        return
    try:
        made = call.make()
    except BaseException as error:
        # Libraries in Rust panic with what is no Exception: that would end whoever waits, not the request.
        if not isinstance(error, Exception):
            log.error("a prompt could not be made", exc_info=error)
            error = RuntimeError(repr(error))
        call.result.set_exception(error)
    else:
        call.result.set_result(made)


def _yield_to_others() -> None:
    # Only Linux has priorities of single threads.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
