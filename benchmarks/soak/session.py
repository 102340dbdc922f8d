"""One conversation of an agent, from its first word, as its client has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.soak.dialects import Ask
from benchmarks.soak.mix import Kind
from benchmarks.soak.replies import Reply
from dormouse.domain.conversation import Message, Role, Tool

CALL_TOKENS = 96
"""Room for a call: a name and a path."""


@dataclass(frozen=True)
class Turn:
    """A reply as it was given: what stood before it (so many messages), and whether it had to be a call."""

    num_messages: int
    calls: bool
    max_tokens: int
    text: str
    arguments: tuple[str, ...]
    life: int


@dataclass
class Session:
    """`messages` is what was said and heard; `length` is in tokens, as of the last reply."""

    kind: Kind
    agent: str
    family: str
    canary: str
    system: str
    tools: Sequence[Tool] = ()
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    length: int = 0
    after: str = ""
    num_heard: int = 0
    """Messages up to and with the last reply: what a server that keeps conversations knows."""

    def ask(self, max_tokens: int, *, calls: bool = False, upto: int | None = None) -> Ask:
        """The request for a reply to all messages, or to the first `upto`."""
        said = self.messages[:upto]
        tokens = CALL_TOKENS if calls else max_tokens
        new = said[self.num_heard :] if upto is None else said
        return Ask(self.agent, self.system, said, new, tokens, self.tools, calls, self.after)

    def heard(self, reply: Reply, ask: Ask, life: int) -> None:
        """The reply is part of the conversation from now on."""
        arguments = tuple(call.arguments for call in reply.calls)
        self.turns.append(Turn(len(self.messages), ask.calls, ask.max_tokens, reply.text, arguments, life))
        self.messages.append(Message(Role.ASSISTANT, reply.text, calls=tuple(reply.calls)))
        self.num_heard = len(self.messages)
        self.length = reply.prompt_tokens + reply.generated_tokens
        self.after = reply.id

    @property
    def num_lives(self) -> int:
        """Of the server, in which it had replies."""
        return len({turn.life for turn in self.turns})
