"""What a dialect is given: the pieces of an answer as they come, and its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from dormouse.domain.conversation import Called, Message, Piece, Role, Said, Thought
from dormouse.domain.requests import TokenLogprob, Usage


class StopReason(Enum):
    """Why an answer ended, finer than the engine knows."""

    END = auto()
    CALLS = auto()
    STOP_STRING = auto()
    MAX_TOKENS = auto()
    CONTEXT_FULL = auto()


@dataclass(frozen=True, slots=True)
class Delta:
    """New pieces of an answer; `logprobs` of the tokens sampled since the last one."""

    pieces: tuple[Piece, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete. `reasoning_tokens` of the completion were thought, not said."""

    reason: StopReason
    usage: Usage
    stop: str | None
    reasoning_tokens: int
    reply: Message


@dataclass(frozen=True, slots=True)
class Answer:
    """All of one answer."""

    deltas: tuple[Delta, ...]
    end: End


@dataclass(slots=True)
class AnswerSoFar:
    """The pieces of an answer that is being given."""

    said: str = ""
    thought: str = ""
    calls: list[Called] = field(default_factory=list)

    def add(self, pieces: list[Piece]) -> tuple[Piece, ...]:
        """Take new pieces."""
        for piece in pieces:
            match piece:
                case Said(text):
                    self.said += text
                case Thought(text):
                    self.thought += text
                case Called():
                    self.calls.append(piece)
        return tuple(pieces)

    def message(self) -> Message:
        """The answer as the message that a client will replay."""
        calls = tuple(called.call for called in self.calls)
        return Message(Role.ASSISTANT, self.said, self.thought, calls)
