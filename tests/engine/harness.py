"""An engine on the fake runtime over a real store, driven by tests."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dormouse.domain.constraint import Constraint
from dormouse.domain.plan import Plan
from dormouse.domain.requests import (
    Event,
    Failed,
    Finished,
    Priority,
    Request,
    SamplingParams,
    Started,
    TextDelta,
    TokenLogprob,
)
from dormouse.engine.detokenizer import TokenDecoder
from dormouse.engine.engine import Engine
from dormouse.engine.options import EngineOptions
from dormouse.runtimes.base import Logits, Runtime
from dormouse.runtimes.fake import EOS, ByteDecoder, FakeRuntime, encode
from dormouse.store.block_store import BlockStore

WAIT_S = 20.0
GREEDY = SamplingParams(temperature=0, max_tokens=8)

_ids = itertools.count()


class GatedRuntime(FakeRuntime):
    """Computes a step only when the test lets it; `plans` holds what was planned."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.allow = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.plans: list[Plan] = []

    def forward(self, plan: Plan) -> Logits:
        self.plans.append(plan)
        self.started.release()
        assert self.allow.acquire(timeout=WAIT_S)
        return super().forward(plan)

    def run_freely(self) -> None:
        self.allow.release(100_000)

    def step_until_ended(self, thread: threading.Thread) -> None:
        """Step slowly until `thread`, which tells the engine something, has ended: no reply ends before."""
        end = time.monotonic() + WAIT_S
        while thread.is_alive():
            assert time.monotonic() < end, f"{thread.name} did not end"
            self.allow.release()
            thread.join(0.05)


@dataclass
class Call:
    """A submitted request and what came back."""

    request: Request
    _events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    text: str = ""
    started: Started | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Finished | Failed | None = None
    wait_s: float = WAIT_S

    def next(self) -> Event:
        event = self._events.get(timeout=self.wait_s)
        if isinstance(event, TextDelta):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, Started):
            self.started = event
        else:
            self.end = event
        return event

    def result(self) -> Finished | Failed:
        while self.end is None:
            self.next()
        assert self._events.empty(), "an event came after the end"
        return self.end

    def finished(self) -> Finished:
        end = self.result()
        assert isinstance(end, Finished), end
        return end

    def failed(self) -> Failed:
        end = self.result()
        assert isinstance(end, Failed), end
        return end


class Client:
    """Talks to an engine as the API does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        agent: str | None = None,
        deadline_s: float = 60.0,
        tenant: str = "default",
        priority: Priority = Priority.MAIN,
        constraint: Constraint | None = None,
    ) -> Call:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tokens = encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        request = Request(
            f"r{next(_ids)}",
            tokens,
            sampling,
            events.put,
            agent,
            tenant,
            deadline_s=deadline_s,
            priority=priority,
            constraint=constraint,
        )
        self.engine.submit(request)
        return Call(request, events)

    def ask(self, prompt: str, *, max_tokens: int = 8, agent: str | None = None) -> tuple[str, Finished]:
        call = self.submit(prompt, replace(GREEDY, max_tokens=max_tokens), agent=agent)
        finished = call.finished()
        return call.text, finished


@contextmanager
def opened(
    folder: Path,
    *,
    num_pages: int = 32,
    runtime: Runtime | None = None,
    store: BlockStore | None = None,
    new_decoder: Callable[[], TokenDecoder] = ByteDecoder,
    grace_s: float = 0.0,
    **options: float,
) -> Iterator[Client]:
    """A running engine over the store in `folder`; both are checked and closed at the end."""
    store = store or BlockStore.open(folder, quota_nbytes=1 << 30)
    engine = Engine(
        runtime or FakeRuntime(num_pages),
        store,
        new_decoder,
        frozenset({EOS}),
        EngineOptions(**options),  # type: ignore[arg-type]
    )
    try:
        yield Client(engine)
    finally:
        engine.stop(grace_s)
        engine.check()
        store.flush()
        store.check()
        store.close()
