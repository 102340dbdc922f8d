"""Hermes, Qwen 2.5 and 3, SmolLM: JSON between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dormouse.domain.conversation import Message, Tool, ToolCall
from dormouse.models.tool_formats.base import (
    CallForm,
    Literal,
    Marker,
    RawCall,
    Region,
    call_object,
    dumps,
    raw_calls,
    read_json,
    tool_json,
)
from dormouse.models.tool_formats.regions import Delimited

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Hermes:
    """One JSON object per pair of markers; with `is_list` one pair around a JSON list, as SmolLM2 was
    taught. Both are read."""

    is_list: bool = False
    openings: tuple[str, ...] = (_OPENING,)
    markers: tuple[str, ...] = (_OPENING, _CLOSING)
    opens_bare: bool = False
    gap: str = " \t\r\n"
    call_id_length: int | None = None

    def region(self, _opening: str, _tools: Sequence[Tool]) -> Region:
        """Up to the closing marker."""
        return Delimited(_CLOSING, _parse, is_json=True)

    def instruction(self, tools: Sequence[Tool]) -> str:
        """Signatures as JSON between `<tools>` and `</tools>`, then the form of a call."""
        call = '{"name": "function name", "arguments": {"parameter": "value"}}'
        if self.is_list:
            listed = dumps([tool_json(tool) for tool in tools])
            form = f"{_OPENING}[{call}]{_CLOSING}"
            how = "To call functions, write their calls as one JSON list, and nothing else, in this form:"
        else:
            listed = "\n" + "\n".join(dumps(tool_json(tool)) for tool in tools) + "\n"
            form = f"{_OPENING}\n{call}\n{_CLOSING}"
            how = "To call a function, write its name and arguments as JSON in this form:"
        return f"You have access to these functions:\n<tools>{listed}</tools>\n\n{how}\n{form}"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls between their markers."""
        bodies = [dumps({"name": call.name, "arguments": call.parsed()}) for call in calls]
        if self.is_list:
            return f"{_OPENING}[{', '.join(bodies)}]{_CLOSING}"
        return "\n".join(f"{_OPENING}\n{body}\n{_CLOSING}" for body in bodies)

    def answered(self, message: Message) -> str:
        """The result between `<tool_response>` and `</tool_response>`."""
        return f"<tool_response>\n{message.text}\n</tool_response>"

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """Objects between markers, or a list of them between one pair."""
        calls = tuple(call_object(tool, "arguments") for tool in tools)
        if self.is_list:
            return CallForm(
                (Marker(_OPENING), Literal("[")), calls, (Literal(", "),), (Literal("]"), Marker(_CLOSING))
            )
        around = (Literal("\n"), Marker(_CLOSING), Literal("\n"), Marker(_OPENING), Literal("\n"))
        return CallForm((Marker(_OPENING), Literal("\n")), calls, around, (Literal("\n"), Marker(_CLOSING)))


def _parse(body: str) -> tuple[RawCall, ...] | None:
    return raw_calls(read_json(body), "arguments", "parameters")
