"""A client of an engine in the same process: what a request costs without HTTP."""

from __future__ import annotations

import queue
import random
import threading
import time
import uuid
from dataclasses import dataclass, replace

from dormouse.domain.requests import (
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    Started,
    TextDelta,
    Usage,
)
from dormouse.engine.engine import Engine

_DEADLINE_S = 1800.0
_GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True, slots=True)
class Reply:
    """One measured reply. Times are seconds of the monotonic clock; `token_times` has one per token."""

    submitted: float
    token_times: tuple[float, ...]
    token_ids: tuple[int, ...]
    usage: Usage

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.submitted


class PendingReply:
    """A submitted request, greedy unless `sampling` says otherwise. Every token is seen, because log
    probabilities are asked for."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_tokens: int,
        agent: str | None = None,
        sampling: SamplingParams = _GREEDY,
    ) -> None:
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        sampling = replace(sampling, max_tokens=max_tokens, ignore_eos=True, top_logprobs=0)
        request = Request(
            uuid.uuid4().hex, tuple(prompt), sampling, self._sink, agent, deadline_s=_DEADLINE_S
        )
        self._started = threading.Event()
        self._submitted = time.monotonic()
        engine.submit(request)

    def wait(self) -> Reply:
        """The finished reply. Raises the error of a failed one."""
        times: list[float] = []
        tokens: list[int] = []
        while True:
            moment, event = self._events.get(timeout=_DEADLINE_S)
            if isinstance(event, TextDelta):
                times += [moment] * len(event.logprobs)
                tokens += [entry.token_id for entry in event.logprobs]
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                return Reply(self._submitted, tuple(times), tuple(tokens), event.usage)

    def wait_for_first_token(self) -> None:
        """Return once a token came, or the end. Raises TimeoutError."""
        if not self._started.wait(_DEADLINE_S):
            raise TimeoutError("no token came")

    def _sink(self, event: Event) -> None:
        self._events.put((time.monotonic(), event))
        if not isinstance(event, Started):
            self._started.set()


def random_prompt(seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Token ids that no other seed shares a prefix with; a dense model takes any as long."""
    return random.Random(seed).choices(range(vocab_size), k=num_tokens)
