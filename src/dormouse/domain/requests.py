"""Requests and the events that answer them: one type for every dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from dormouse.domain.agents import DEFAULT_TENANT
from dormouse.domain.constraint import Constraint
from dormouse.domain.errors import DormouseError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off; `min_p` keeps tokens at least that
    fraction as likely as the best one. Penalties follow OpenAI (presence and frequency count generated
    tokens) and CTRL (repetition counts prompt tokens too). `top_logprobs` None reports no logprobs, 0 only
    those of the chosen token. `stop` strings never appear in the text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    min_tokens: int = 0
    ignore_eos: bool = False


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """An end-of-turn token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or no room left in the context."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a chosen token, before penalties and temperature, and the best others."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the tokens of a request came from.

    `memory_tokens` were found in pages, `disk_tokens` were read from the store; the rest of the prompt was
    computed. `completion_tokens` counts sampled tokens, the end-of-turn token included.
    """

    prompt_tokens: int
    memory_tokens: int
    disk_tokens: int
    completion_tokens: int

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return self.memory_tokens + self.disk_tokens


@dataclass(frozen=True, slots=True)
class Started:
    """The request has its pages: `usage` says what of its prompt was found. Rarely sent twice, when what was
    found could not be read."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a reply. `logprobs` has one entry per token sampled since the last event."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class Priority(IntEnum):
    """Whose turn it is when not everything fits; side requests never push out a main conversation."""

    MAIN = 0
    SIDE = 1
    """Titles, classifiers, warm-ups: what a client asks beside its conversation."""


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a reply waited for its turn, for its blocks from the disk, for its first token, and how long
    it went on from there; in seconds. What a preemption costs is in the phase that it interrupts."""

    queued_s: float = 0.0
    wake_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply is complete. `stop` is the matched stop string, if one ended it; `tokens` are the ids that
    were generated, the end-of-turn token included."""

    reason: FinishReason
    usage: Usage
    stop: str | None = None
    tokens: tuple[int, ...] = ()
    timings: Timings = field(default=Timings(), compare=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """The reply ended by an error; nothing follows."""

    error: DormouseError


Event = Started | TextDelta | Finished | Failed


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `sink` is called on the engine thread and must not block.

    Every accepted request ends in exactly one Finished or Failed, unless it was aborted by its sender.
    `deadline_s` is in seconds from submission. `constraint` is this reply's alone.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    sink: Callable[[Event], None] = field(repr=False)
    agent: str | None = None
    tenant: str = DEFAULT_TENANT
    deadline_s: float = 600.0
    constraint: Constraint | None = field(default=None, repr=False, compare=False)
    priority: Priority = Priority.MAIN
