"""The engine: one thread, one inbox. HTTP handlers, finished disk reads and aborts post to it; answers
leave through each request's sink. What the thread does is in `loop.py`."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from dormouse.domain.blocks import BlockKey
from dormouse.domain.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    DormouseError,
    EngineDead,
    EngineStalled,
    InvalidRequest,
    QueueFull,
    ShuttingDown,
    Unavailable,
)
from dormouse.domain.places import Places
from dormouse.domain.requests import Failed, Finished, Request
from dormouse.engine.detokenizer import TokenDecoder
from dormouse.engine.loop import EngineLoop
from dormouse.engine.options import EngineOptions
from dormouse.engine.stats import EngineStats
from dormouse.runtimes.base import Runtime
from dormouse.store.block_store import BlockStore

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_RETRY_AFTER_S = 60
_REPLIES_REMEMBERED = 32
_PACE_WINDOW_S = 60.0
_UNKNOWN_PACE_S = 1.0
"""Seconds between the ends of replies, as long as none has ended lately."""

_ANSWER_S = 30.0
_MAX_WAIT_S = 3600.0
"""Timers do not take a wait of any length; to look once more an hour costs nothing."""


class Engine:
    """Serves requests on a runtime, over a store. Its thread runs from construction to `stop`.

    `new_decoder` makes the text decoder of one reply, `eos_token_ids` end a reply.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: BlockStore,
        new_decoder: Callable[[], TokenDecoder],
        eos_token_ids: frozenset[int],
        options: EngineOptions,
    ) -> None:
        self.runtime = runtime
        self.options = options
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop = EngineLoop(
            runtime,
            store,
            new_decoder,
            eos_token_ids,
            options,
            post=self._post,
            answer=self._answer,
        )
        self._stop_at: float | None = None
        # When the thread last turned to something, and whether it waits for messages; see `busy_s`.
        self._turned_at = time.monotonic()
        self._is_resting = False
        # Guards what callers read and change before the engine thread sees their request.
        self._gate = threading.Lock()
        self._open = Places(options.max_queue + options.max_running)
        self._closed: DormouseError | None = None
        self._why: Unavailable | None = None
        self._ended = False
        self.num_cut = 0
        """Requests that did not finish before the engine ended."""
        self._ends: deque[float] = deque(maxlen=_REPLIES_REMEMBERED)
        self._promised_until = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int:
        """The longest sequence that can ever run, in tokens."""
        return self._loop.max_length

    @property
    def death(self) -> EngineDead | None:
        """The error that ended the loop, if one did."""
        return self._closed if isinstance(self._closed, EngineDead) else None

    @property
    def is_stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._closed is not None

    @property
    def num_open(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._open)

    @property
    def max_open(self) -> int:
        """So many requests are accepted at a time; a few more of tenants that have few among them."""
        return self._open.room

    @property
    def busy_s(self) -> float:
        """Seconds that the thread has been at one step or one message; 0 while it waits for messages."""
        return 0.0 if self._is_resting or self._ended else time.monotonic() - self._turned_at

    def submit(self, request: Request) -> None:
        """Accept a request: from here on its sink gets exactly one Finished or Failed.

        Raises InvalidRequest, ContextLengthExceeded, QueueFull, ShuttingDown, EngineStalled or EngineDead
        instead of accepting.
        """
        self._check(request)
        if (busy_s := self.busy_s) > request.deadline_s:
            raise EngineStalled(
                f"the engine has been at one step for {busy_s:.0f} s, longer than a request may take; "
                "restart the server if it stays so",
                retry_after_s=_MAX_RETRY_AFTER_S,
            )
        with self._gate:
            if self._closed is not None:
                raise self._closed
            if not self._open.take(request.tenant):
                raise QueueFull(
                    f"{len(self._open)} requests are open and the queue is full; retry later",
                    retry_after_s=self._retry_after(),
                )
            deadline = time.monotonic() + request.deadline_s
            self._inbox.put(partial(self._loop.add, request, deadline))

    def abort(self, request_id: str) -> None:
        """The sender went away: stop, keep what was computed, answer nothing more."""
        self._post(partial(self._abort, request_id))

    def is_resident(self, key: BlockKey) -> bool:
        """Whether the block is in the arena right now."""
        return not self._ended and self._loop.is_resident(key)

    def num_replies(self, tenant: str, agent: str) -> int:
        """How many requests of an agent are open. Waits; raises as `release` does."""
        return self._ask(partial(self._loop.num_replies, tenant, agent))

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Have the store write those blocks in idle pages that it lacks. Raises as `release` does."""
        self._ask(partial(self._loop.residence.offer, keys))

    def release(self, keys: Sequence[BlockKey]) -> int:
        """Free the idle pages of those blocks that are on disk; how many. Waits for the engine thread.

        Raises DeadlineExceeded when it does not come to it, and why it has ended when it has.
        """
        return self._ask(partial(self._loop.residence.release, keys))

    def abandon(self, tenant: str, agent: str) -> list[BlockKey] | None:
        """Fail the open requests of an agent with AgentNotFound, and save nothing more of them.

        Returned are their blocks that may be stored already; None when there was no such request. Waits;
        raises as `release` does.
        """
        return self._ask(partial(self._loop.abandon, tenant, agent))

    def forget(self, keys: Collection[BlockKey]) -> int:
        """Let no request match these blocks in memory, nor what follows them. Raises as `release` does."""
        return self._ask(partial(self._loop.residence.forget, keys))

    def stats(self) -> EngineStats:
        """A snapshot for health and tools."""
        return self._loop.stats()

    def check(self) -> None:
        """Raise AssertionError when the books do not balance. Only for an engine that has ended."""
        assert self._ended, "the engine still runs"
        assert not self._open, f"{len(self._open)} requests were never answered"
        if self.death is None:
            self._loop.check()  # a dead loop left its pages where they were

    def stop(self, grace_s: float, why: Unavailable | None = None) -> None:
        """End the engine: refuse new requests, let open ones finish within `grace_s` seconds, then
        save and fail the rest, with `why` if it is given. Blocks until the thread has ended; another call
        with a shorter grace cuts the first one short."""
        with self._gate:
            if self._closed is None:
                self._why = why
                self._closed = why or ShuttingDown("the server is shutting down; retry when it is back")
        self._post(partial(self._begin_stop, time.monotonic() + grace_s))
        self._thread.join()

    def _check(self, request: Request) -> None:
        """Refuse what can never run, on the caller's thread."""
        prompt, limit = request.prompt, self.max_length
        vocab_size = self.runtime.spec.vocab_size
        if not prompt:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if len(prompt) >= limit:
            by_model = limit == self.runtime.spec.context_length
            why = "the model's context" if by_model else "the arena's size, see --arena-tokens"
            raise ContextLengthExceeded(len(prompt), limit - 1, f"{why} leaves one for the reply")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InvalidRequest(f"the prompt has token ids outside 0..{vocab_size - 1}", param="prompt")

    def _retry_after(self) -> int:
        """Whole seconds until a place in the queue is likely to be free for one more.

        Each who is refused is told of a place of its own, or all of a flood would come back for the first.
        """
        now = time.monotonic()
        recent = [end for end in self._ends if end > now - _PACE_WINDOW_S]
        interval = (now - recent[0]) / len(recent) if recent else _UNKNOWN_PACE_S
        self._promised_until = min(max(self._promised_until, now) + interval, now + _MAX_RETRY_AFTER_S)
        return max(1, math.ceil(self._promised_until - now))

    def _ask(self, question: Callable[[], T]) -> T:
        """Have the engine thread run `question`, and wait for what it returns."""
        answer: Future[T] = Future()

        def reply() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)
                raise

        with self._gate:
            if self._ended:
                assert self._closed is not None, "an ended engine says why"
                raise self._closed
            self._inbox.put(reply)
        try:
            return answer.result(_ANSWER_S)
        except TimeoutError:
            raise DeadlineExceeded(f"the engine did not get to it within {_ANSWER_S:g} s; retry") from None

    def _post(self, message: Callable[[], None]) -> None:
        """Put a message into the inbox. An ended engine has nobody to read it, so it is dropped."""
        with self._gate:
            if not self._ended:
                self._inbox.put(message)

    # -- the engine thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            idle = False
            while not self._is_done():
                self._drain(self._patience() if idle else 0.0)
                self._turned_at = time.monotonic()
                idle = not self._loop.step()
            self._end(self._why or ShuttingDown("the server is shutting down; what was generated is saved"))
        except BaseException as error:  # libraries in Rust panic with one that is no Exception
            log.critical("the engine loop died", exc_info=error)
            self._end(EngineDead(f"the engine died of {error!r}; restart the server"))

    def _is_done(self) -> bool:
        if self._stop_at is None:
            return False
        return not self._loop.has_work or time.monotonic() >= self._stop_at

    def _patience(self) -> float | None:
        """Seconds until something is due although no message comes; None is for ever."""
        due = [moment for moment in (self._loop.next_deadline(), self._stop_at) if moment is not None]
        return min(_MAX_WAIT_S, max(0.0, min(due) - time.monotonic())) if due else None

    def _drain(self, patience: float | None) -> None:
        """Handle every message that is there; wait `patience` seconds for the first one."""
        self._is_resting = True
        try:
            message = self._inbox.get(block=patience != 0.0, timeout=patience)
            while True:
                self._turned_at = time.monotonic()
                self._is_resting = False
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return
        finally:
            self._turned_at = time.monotonic()
            self._is_resting = False

    def _abort(self, request_id: str) -> None:
        if (request := self._loop.abort(request_id)) is not None:
            with self._gate:
                self._open.give_back(request.tenant)

    def _answer(self, request: Request, event: Finished | Failed) -> None:
        """The one place where a request ends."""
        with self._gate:
            self._open.give_back(request.tenant)
            self._ends.append(time.monotonic())
        request.sink(event)

    def _begin_stop(self, stop_at: float) -> None:
        self._stop_at = stop_at if self._stop_at is None else min(self._stop_at, stop_at)

    def _end(self, error: DormouseError) -> None:
        """Nothing runs after this: answer everyone who waits, and refuse everyone who comes."""
        with self._gate:
            self._closed = error
            self._ended = True
        while not self._inbox.empty():
            try:
                self._inbox.get_nowait()()
            except Exception:
                log.exception("a message could not be handled at the end")
        self.num_cut = self._loop.end(error, trust_pages=not isinstance(error, EngineDead))
