"""Mistral: `[TOOL_CALLS]` and a JSON list, or, since the eleventh tokenizer, `name[ARGS]{json}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from dormouse.domain.conversation import Message, Tool, ToolCall
from dormouse.models.tool_formats.base import (
    CallForm,
    Literal,
    Marker,
    RawCall,
    Region,
    arguments,
    call_object,
    dumps,
    raw_calls,
    read_json,
    tool_json,
)
from dormouse.models.tool_formats.regions import JsonRegion

_OPENING, _ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_NAME = r"(?P<name>[\w.-]{1,128})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*"
_HEAD = regex.compile(rf"\s*(?:[{{\[]|{_NAME}\{{)")
_NAMED = regex.compile(rf"\s*{_NAME}")


@dataclass(frozen=True, slots=True)
class Mistral:
    """One list of calls, or with `is_named` one marker, name and arguments per call. Both are read."""

    is_named: bool = False
    openings: tuple[str, ...] = (_OPENING,)
    markers: tuple[str, ...] = (_OPENING, "[CALL_ID]", _ARGUMENTS)
    opens_bare: bool = False
    gap: str = " \t\r\n"
    call_id_length: int | None = 9

    def region(self, _opening: str, _tools: Sequence[Tool]) -> Region:
        """Up to the end of the JSON value."""
        return JsonRegion(_HEAD, _parse)

    def instruction(self, tools: Sequence[Tool]) -> str:
        """As the templates write it."""
        return f"[AVAILABLE_TOOLS]{dumps([tool_json(tool) for tool in tools])}[/AVAILABLE_TOOLS]"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls behind their marker."""
        if self.is_named:
            return "".join(f"{_OPENING}{call.name}{_ARGUMENTS}{dumps(call.parsed())}" for call in calls)
        return _OPENING + dumps([{"name": call.name, "arguments": call.parsed()} for call in calls])

    def answered(self, message: Message) -> str:
        """The result between its markers."""
        return f"[TOOL_RESULTS]{dumps({'content': message.text})}[/TOOL_RESULTS]"

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """A list, or names and arguments each behind a marker."""
        if not self.is_named:
            calls = tuple(call_object(tool, "arguments") for tool in tools)
            return CallForm((Marker(_OPENING), Literal("[")), calls, (Literal(", "),), (Literal("]"),))
        named = tuple((Literal(tool.name), Marker(_ARGUMENTS), arguments(tool)) for tool in tools)
        return CallForm((Marker(_OPENING),), named, (Marker(_OPENING),), ())


def _parse(head: str, value: str) -> tuple[RawCall, ...] | None:
    named = _NAMED.fullmatch(head)
    read = read_json(value)
    if named is None:
        return raw_calls(read, "arguments", "parameters")
    return (RawCall(named["name"], dumps(read)),) if isinstance(read, dict) else None
