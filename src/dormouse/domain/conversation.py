"""A conversation as every dialect means it: messages, tools, and what the answer has to look like.

Dialects translate into this and back; nothing behind them knows whose client is asking.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_MOST_LEVELS = 200
"""What is read may be nested deeper than what can be written: Python's stack bears only so much."""


class Role(StrEnum):
    """Who says a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model. `arguments` is a JSON object as text, its keys in the model's order."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> Any:
        """The arguments as a value; the text itself when it is no JSON, or nested as no arguments are."""
        try:
            value = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return self.arguments
        return self.arguments if _is_deep(value) else value


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `reasoning` and `calls` are the assistant's; `call_id` is the call that a tool answers,
    `name` that tool's name where the client said it."""

    role: Role
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema, its keys in the client's order.

    With `strict` the arguments must be valid by construction.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class ToolMode(StrEnum):
    """Whether the model may, must or must not call tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names`, where not empty, are the only tools that may be called. Without `parallel` at most one call
    is made in a reply."""

    mode: ToolMode = ToolMode.AUTO
    names: tuple[str, ...] = ()
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The text of the answer is JSON: any object where `schema` is None, else one that the schema allows.

    `strict` refuses a schema that cannot be enforced in full, where otherwise what cannot is left out.
    """

    schema: Mapping[str, Any] | None = None
    strict: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is asked to continue. `variables` are the chat template's own (`enable_thinking`, ...).

    With `continues` the last message is the assistant's and goes on where it stops.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    format: OutputFormat | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_LEVELS):
        holders = [node for node in level if isinstance(node, dict | list)]
        level = [inner for node in holders for inner in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return False
    return True


# -- the answer, piece by piece ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """New text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """New text of the model's reasoning, which clients show apart from the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A whole call of a tool."""

    call: ToolCall


Piece = Said | Thought | Called


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    together: list[Piece] = []
    for piece in pieces:
        last = together[-1] if together else None
        if isinstance(piece, Said) and isinstance(last, Said):
            together[-1] = Said(last.text + piece.text)
        elif isinstance(piece, Thought) and isinstance(last, Thought):
            together[-1] = Thought(last.text + piece.text)
        else:
            together.append(piece)
    return together
