"""Answers by a script in place of a model: what the renderers of every dialect are given, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from dormouse.api.answer import Answer, Delta, End, StopReason
from dormouse.api.generation import Generation
from dormouse.domain.conversation import Called, Message, Piece, Role, Said, Thought, ToolCall
from dormouse.domain.errors import DormouseError
from dormouse.domain.requests import TokenLogprob, Usage
from dormouse.models.served import ServedModel

USED = Usage(prompt_tokens=300, memory_tokens=128, disk_tokens=64, completion_tokens=9)

Step = Delta | End | DormouseError | None
"""None is a long silence; an error is raised."""


def said(*texts: str) -> list[Step]:
    """The answer says these, one after the other."""
    return [Delta((Said(text),)) for text in texts]


def thought(*texts: str) -> list[Step]:
    """The model thinks these."""
    return [Delta((Thought(text),)) for text in texts]


def called(id: str, name: str, arguments: str) -> Step:
    """The model calls a tool."""
    return Delta((Called(ToolCall(id, name, arguments)),))


def with_logprobs(text: str) -> Step:
    """Text of the fake runtime's tokens, which are bytes, each with its log probability and one other."""
    entries = tuple(TokenLogprob(byte, -0.5, ((byte, -0.5), (33, -1.25))) for byte in text.encode())
    return Delta((Said(text),), entries)


@dataclass
class Scripted:
    """Stands in for a `Generation`: gives its steps, and an end that fits them."""

    served: ServedModel
    steps: Sequence[Step]
    reason: StopReason = StopReason.END
    stop: str | None = None
    prompt_keys: tuple[bytes, ...] = ()

    async def started(self) -> Usage:
        """What is known before the first piece."""
        return Usage(USED.prompt_tokens, USED.memory_tokens, USED.disk_tokens, 0)

    async def events(self) -> AsyncGenerator[Delta | End | None, None]:
        """The steps, then the end."""
        for step in self.steps:
            if isinstance(step, DormouseError):
                raise step
            yield step
        yield self._end()

    async def collect(self) -> Answer:
        """All of the answer. Raises the error that is among the steps."""
        events = [event async for event in self.events()]
        return Answer(tuple(event for event in events if isinstance(event, Delta)), self._end())

    async def aclose(self) -> None:
        """Nothing runs."""

    def _end(self) -> End:
        pieces: list[Piece] = [p for step in self.steps if isinstance(step, Delta) for p in step.pieces]
        text = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        calls = tuple(piece.call for piece in pieces if isinstance(piece, Called))
        reply = Message(Role.ASSISTANT, text, reasoning, calls)
        return End(self.reason, USED, self.stop, 4 if reasoning else 0, reply)


def play(
    patch: pytest.MonkeyPatch, steps: Sequence[Step], reason: StopReason, stop: str | None = None
) -> None:
    """Every generation of this process follows the script from now on."""

    async def begin(_: object, served: ServedModel, *__: Any) -> Scripted:
        return Scripted(served, steps, reason, stop)

    replaced: Callable[..., Any] = begin
    patch.setattr(Generation, "begin", replaced)
