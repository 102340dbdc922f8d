"""Llama 3: a reply that is the JSON of a call, after `<|python_tag|>` or bare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from dormouse.domain.conversation import Message, Tool, ToolCall
from dormouse.models.tool_formats.base import (
    CallForm,
    Literal,
    RawCall,
    Region,
    call_object,
    dumps,
    raw_calls,
    read_json,
    tool_json,
)
from dormouse.models.tool_formats.regions import JsonRegion

_HEAD = regex.compile(r"\s*[{\[]")


@dataclass(frozen=True, slots=True)
class Llama3:
    """`{"name": ..., "parameters": {...}}`, several of them with `; ` between."""

    openings: tuple[str, ...] = ("<|python_tag|>",)
    markers: tuple[str, ...] = ("<|python_tag|>",)
    opens_bare: bool = True
    gap: str = " \t\r\n;"
    call_id_length: int | None = None

    def region(self, _opening: str, _tools: Sequence[Tool]) -> Region:
        """Up to the end of the JSON value."""
        return JsonRegion(_HEAD, _parse)

    def instruction(self, tools: Sequence[Tool]) -> str:
        """The functions as JSON, then the form of a call."""
        listed = "\n".join(dumps(tool_json(tool)) for tool in tools)
        form = '{"name": "function name", "parameters": {"parameter": "value"}}'
        how = (
            "To call a function, answer with its name and parameters as JSON, and nothing else, in this form:"
        )
        return f"You have access to these functions:\n{listed}\n\n{how}\n{form}"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls as JSON."""
        return "; ".join(dumps({"name": call.name, "parameters": call.parsed()}) for call in calls)

    def answered(self, message: Message) -> str:
        """The result as JSON."""
        return dumps({"output": message.text})

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """Bare JSON: the marker is for Meta's own tools."""
        return CallForm((), tuple(call_object(tool, "parameters") for tool in tools), (Literal("; "),), ())


def _parse(_head: str, value: str) -> tuple[RawCall, ...] | None:
    return raw_calls(read_json(value), "parameters", "arguments")
