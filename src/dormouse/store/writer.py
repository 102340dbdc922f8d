"""The writer thread: a queue bounded in bytes, batches, and one step at a time through the keeper."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeVar

from dormouse.domain.blocks import BlockKey
from dormouse.domain.errors import DeadlineExceeded, DormouseError, StoreError
from dormouse.store.health import WRITE_ERRORS, Health
from dormouse.store.keeper import Keeper
from dormouse.store.ledger import Count, Counters
from dormouse.store.notes import Notes
from dormouse.store.view import PendingBlock, StoreView, UnsavedAgent

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BATCH_ITEMS = 64

_STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """An admin action that runs between batches; its caller waits for `result`."""

    action: Callable[[], object]
    result: Future[Any]


@dataclass(slots=True)
class Batch:
    """Queue items in order: blocks and agents, then at most one job."""

    blocks: list[PendingBlock] = field(default_factory=list)
    agents: list[UnsavedAgent] = field(default_factory=list)
    job: Job | None = None


class Writer:
    """Owns the keeper. Every public method may be called from any thread; only `run` and `stop` wait."""

    def __init__(
        self,
        keeper: Keeper,
        view: StoreView,
        notes: Notes,
        counters: Counters,
        health: Health,
        *,
        max_batch_nbytes: int,
        retry_s: float,
        touch_interval_s: float,
    ) -> None:
        self._keeper = keeper
        self._view = view
        self._notes = notes
        self._counters = counters
        self._health = health
        self._max_batch_nbytes = max_batch_nbytes
        self._retry_s = retry_s
        self._touch_interval_s = touch_interval_s
        self._queue: deque[PendingBlock | UnsavedAgent | Job] = deque()
        self._changed = Condition()
        self._stopping = False
        self._error: Exception | None = None
        self._step_since: float | None = None
        self._touches_written_at = time.monotonic()
        self._thread = Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def put(self, block: PendingBlock) -> bool:
        """Queue a block. False when the queue is full or the writer has stopped."""
        with self._changed:
            accepted = self._view.offer(block) if self._accepts else False
            if accepted:
                self._queue.append(block)
                self._changed.notify()
        if accepted is False:
            self._counters.add(Count.REFUSED_PUTS)
        return accepted is not False

    def save(self, agent: UnsavedAgent) -> None:
        """Queue an agent, after everything queued before."""
        self._view.save(agent)
        with self._changed:
            accepted = self._accepts
            if accepted:
                self._queue.append(agent)
                self._changed.notify()
        if not accepted:
            _notify([agent], False)

    def post(self, action: Callable[[], T]) -> Future[T]:
        """Queue an action to run on the writer thread; its error is in the future."""
        result: Future[T] = Future()
        with self._changed:
            if self._accepts:
                self._queue.append(Job(action, result))
                self._changed.notify()
                return result
        result.set_exception(StoreError("the store does not write any more; restart the server"))
        return result

    def run(self, action: Callable[[], T], timeout_s: float) -> T:
        """Run `action` on the writer thread and wait. Raises what it raises, and DeadlineExceeded."""
        try:
            return self.post(action).result(timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the store did not get to it within {timeout_s} s; it may still happen, look again"
            ) from None

    def wake(self) -> None:
        """There are notes to write, or touches to record after the usual interval."""
        with self._changed:
            self._changed.notify()

    @property
    def busy_s(self) -> float:
        """Seconds that the thread has been at one batch; 0 while it waits for one."""
        since = self._step_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self) -> bool:
        """Work off the queue, record touches, end the thread. Waits; a second call does nothing.

        False when the disk does not answer and the thread is left behind.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        until = time.monotonic() + _STOP_S
        while self._thread.is_alive() and (self.busy_s < _STOP_S or time.monotonic() < until):
            self._thread.join(1.0)
        return not self._thread.is_alive()

    @property
    def _accepts(self) -> bool:
        return not self._stopping and self._error is None

    def _run(self) -> None:
        batch: Batch | None = None
        try:
            while (batch := self._take()) is not None:
                self._begin_step()
                self._step(batch)
                self._step_since = None
            self._keeper.settle(self._begin_step)
            self._step_since = None
        except Exception as error:
            log.exception("the writer stopped by an error of ours")
            self._fail(error, batch)

    def _begin_step(self) -> None:
        self._step_since = time.monotonic()

    def _take(self) -> Batch | None:
        """The next batch, an empty one when something is due, None when all is done after `stop`."""
        with self._changed:
            while not self._queue:
                if self._stopping:
                    return None
                wait_s = self._idle_s()
                if wait_s is not None and wait_s <= 0:
                    return Batch()
                if not self._changed.wait(wait_s):
                    return Batch()
            return self._next_batch()

    def _next_batch(self) -> Batch:
        batch = Batch()
        nbytes = 0
        while self._queue and len(batch.blocks) + len(batch.agents) < MAX_BATCH_ITEMS:
            item = self._queue[0]
            if isinstance(item, PendingBlock):
                nbytes += len(item.payload)
                if batch.blocks and nbytes > self._max_batch_nbytes:
                    break
                batch.blocks.append(item)
            elif isinstance(item, UnsavedAgent):
                batch.agents.append(item)
            else:
                batch.job = item
            self._queue.popleft()
            if batch.job is not None:
                break
        return batch

    def _idle_s(self) -> float | None:
        """Seconds until something is due without being queued."""
        if self._keeper.blocks_are_due:
            return 0.0
        if self._keeper.has_leftovers:
            return self._retry_s
        if self._notes.has_unsaved:
            return 0.0
        if self._view.has_touched:
            return self._touches_written_at + self._touch_interval_s - time.monotonic()
        return None

    def _step(self, batch: Batch) -> None:
        self._keeper.unlink_doomed()
        used = self._due_touches()
        has_more = self._keeper.has_leftovers or self._notes.has_unsaved
        if batch.blocks or batch.agents or used or has_more:
            saved = self._keeper.store(batch.blocks, batch.agents, used)
            _notify(batch.agents, saved)
            # Settled: should the job fail by an error of ours, nobody is answered twice.
            batch.blocks.clear()
            batch.agents.clear()
        if batch.job is not None:
            _execute(batch.job)

    def _due_touches(self) -> dict[BlockKey, float]:
        now = time.monotonic()
        if now < self._touches_written_at + self._touch_interval_s and not self._keeper.catalog_failed:
            return {}
        self._touches_written_at = now
        return self._view.take_touched()

    def _fail(self, error: Exception, batch: Batch | None) -> None:
        """Nothing will be written any more: say so to everyone who waits, now and later."""
        self._health.stopped(error)
        with self._changed:
            self._error = error
            left = list(self._queue)
            self._queue.clear()
        blocks = [item for item in left if isinstance(item, PendingBlock)]
        agents = [item for item in left if isinstance(item, UnsavedAgent)]
        jobs = [item for item in left if isinstance(item, Job)]
        if batch is not None:
            blocks += batch.blocks
            agents += batch.agents
            jobs += [batch.job] if batch.job is not None else []
        self._view.drop([block.link.key for block in blocks])
        _notify(agents, False)
        for job in jobs:
            if not job.result.done():
                job.result.set_exception(StoreError(f"the store's writer stopped: {error!r}"))


def _notify(agents: list[UnsavedAgent], durable: bool) -> None:
    for agent in agents:
        if agent.on_durable is None:
            continue
        try:
            agent.on_durable(durable)
        except Exception:
            log.exception("on_durable of agent %r failed", agent.update.id.name)


def _execute(job: Job) -> None:
    if not job.result.set_running_or_notify_cancel():
        return
    try:
        job.result.set_result(job.action())
    except (DormouseError, *WRITE_ERRORS) as error:
        job.result.set_exception(error)
