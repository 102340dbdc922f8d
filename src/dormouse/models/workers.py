"""Threads that render and tokenize prompts, and yield to the engine while they do."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_CORES_PER_THREAD, _MOST_THREADS = 2, 4
"""A decode step waits at every product for the slowest of its threads: leave it cores without company."""

_NICE = 10
"""A prompt can wait a little, a step cannot: it gets a tenth of a core that both want. Not less, since a
thread that does not get to run may hold Python's lock."""


class Workers:
    """A few threads of lower priority, apart from the event loop's own, which wait for disks.

    Calls beyond the number of threads queue up, first come, first served.
    """

    def __init__(self) -> None:
        num_threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // _CORES_PER_THREAD))
        self._threads = ThreadPoolExecutor(num_threads, "prompts", initializer=_yield_to_others)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)` on one of the threads. Raises what it raises.

        If the caller is cancelled before its turn, the call is never made.
        """
        # With the caller's context, which tells logs whose request it is.
        call = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """End the threads; calls that wait are dropped, those that run are waited for. Idempotent."""
        self._threads.shutdown(cancel_futures=True)


def _yield_to_others() -> None:
    # Only Linux has priorities of single threads.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
