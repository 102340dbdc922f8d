"""One request as its client saw it, and the reply it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dormouse.domain.conversation import ToolCall


class Outcome(StrEnum):
    """How a request ended. All but ERROR are meant."""

    OK = "ok"
    LEFT = "left"
    """The client went away in the middle of the stream, as it wanted."""
    REFUSED = "refused"
    """429 or 529 with Retry-After while everybody came at once."""
    RESTART = "restart"
    """The server was being stopped, killed or started."""
    ERROR = "error"


@dataclass
class Reply:
    """What came, as it comes. Token counts are the server's."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    id: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    is_whole: bool = False
    error: str = ""
    error_code: str = ""


@dataclass
class Attempt:
    """A request's times and figures. `at` is seconds into the run, `gaps_ms` lie between pieces of text."""

    kind: str
    agent: str
    dialect: str
    at: float
    max_tokens: int
    in_crowd: bool = False
    outcome: Outcome = Outcome.ERROR
    detail: str = ""
    first_s: float | None = None
    total_s: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    is_call: bool = False

    def take(self, reply: Reply) -> None:
        """The figures of the reply."""
        self.prompt_tokens = reply.prompt_tokens
        self.cached_tokens = reply.cached_tokens
        self.generated_tokens = reply.generated_tokens
        self.is_call = bool(reply.calls)

    def as_json(self) -> dict[str, Any]:
        """One line of the raw records."""
        gaps = [round(gap, 1) for gap in self.gaps_ms]
        return vars(self) | {"at": round(self.at, 2), "total_s": round(self.total_s, 4), "gaps_ms": gaps}
