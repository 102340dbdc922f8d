"""One HTTP request as it is seen from outside: filled in by those who know, read when it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from fastapi import Request as HttpRequest

from dormouse.api.caller import Caller
from dormouse.api.errors import speaks_anthropic
from dormouse.api.rate_limits import RateLimits
from dormouse.domain.errors import DormouseError
from dormouse.domain.requests import Event, Failed, Finished, Request, TextDelta

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(slots=True, eq=False)
class Reply:
    """What was generated for a request. `pieces` says when each piece of text left the engine, in seconds of
    the monotonic clock."""

    request: Request
    model: str
    submitted_at: float
    pieces: list[float] = field(default_factory=list)
    end: Finished | Failed | None = None
    is_refused: bool = False

    @property
    def outcome(self) -> str:
        """Its finish reason, `failed`, `refused` if it never began, `aborted` if the client went away."""
        if self.is_refused:
            return "refused"
        if self.end is None:
            return "aborted"
        return self.end.reason.value if isinstance(self.end, Finished) else "failed"

    @property
    def num_tokens(self) -> int:
        """Tokens that were computed or generated for it. The usage of a reply that was cut is not known: its
        whole prompt counts, and its pieces."""
        if isinstance(self.end, Finished):
            used = self.end.usage
            return used.prompt_tokens - used.cached_tokens + used.completion_tokens
        return len(self.request.prompt) + len(self.pieces) if self.pieces else 0

    def refuse(self, error: DormouseError) -> None:
        """The engine did not take it in."""
        self.is_refused, self.end = True, Failed(error)

    def note(self, event: Event) -> None:
        """On the engine thread: a note, no more, before anybody can see the event."""
        if isinstance(event, TextDelta):
            self.pieces.append(time.monotonic())
        elif isinstance(event, Finished | Failed):
            self.end = event
        self.request.sink(event)


@dataclass(slots=True, eq=False)
class Call:
    """An HTTP request. Times are seconds of the monotonic clock; `route` is the template, never the path,
    which may hold names; `status` 0 is no answer at all."""

    id: str
    method: str
    path: str
    limits: RateLimits
    traceparent: str | None = None
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    caller: Caller | None = None
    """None before anybody knows, and for good where no valid key came."""
    route: str = "unmatched"
    status: int = 0
    replies: list[Reply] = field(default_factory=list)

    @property
    def known_method(self) -> str:
        """The method, if it is one of the usual: a label must not take any value that a client makes up."""
        return self.method if self.method in _METHODS else "other"

    @property
    def dialect(self) -> str:
        """Whose API the path belongs to."""
        if speaks_anthropic(self.path):
            return "anthropic"
        for prefix, name in (("/v1/responses", "responses"), ("/v1/agents", "agents"), ("/v1/", "openai")):
            if self.path.startswith(prefix):
                return name
        return "none"

    @property
    def first_text_at(self) -> float | None:
        """When the first piece of any reply left the engine."""
        return min((reply.pieces[0] for reply in self.replies if reply.pieces), default=None)

    def observe(self, request: Request, model: str) -> Request:
        """`request`, whose events will be noted here on their way to its sink: submit this one.

        Raises RateLimited.
        """
        assert self.caller is not None, "nobody generates without having been let in"
        self.limits.admit_agent(self.caller, request.agent)
        reply = Reply(request, model, time.monotonic())
        self.replies.append(reply)
        return replace(request, sink=reply.note)


def call_of(http: HttpRequest) -> Call:
    """The call that the middleware made for this HTTP request."""
    call = http.scope["state"]["call"]
    assert isinstance(call, Call)
    return call
