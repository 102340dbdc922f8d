"""Qwen3-Coder and Qwen3.5: a call as tags, `<function=name>` and `<parameter=key>`, inside `<tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dormouse.domain.conversation import Message, Tool, ToolCall
from dormouse.models.tool_formats.base import (
    CallForm,
    Choice,
    Form,
    Json,
    Literal,
    Marker,
    Maybe,
    Part,
    Pattern,
    RawCall,
    Region,
    dumps,
    object_strays,
    read_json,
    strays,
    tool_json,
)
from dormouse.models.tool_formats.regions import Delimited

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_CALL = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_TEXT = r"(?s:([^<]|<[^/])*)"
"""A value in a grammar: no tag may close inside of it."""


@dataclass(frozen=True, slots=True)
class QwenXml:
    """Values are written as they are; what type they have only the tool's schema knows."""

    openings: tuple[str, ...] = (_OPENING, _FUNCTION)
    markers: tuple[str, ...] = (_OPENING, _CLOSING)
    opens_bare: bool = False
    gap: str = " \t\r\n"
    call_id_length: int | None = None

    def region(self, opening: str, tools: Sequence[Tool]) -> Region:
        """Up to the closing tag. Models leave the outer pair of tags out now and then."""
        schemas = {tool.name: tool.parameters for tool in tools}
        if opening == _OPENING:
            return Delimited(_CLOSING, lambda body: _parse(body, schemas))
        return Delimited(
            _FUNCTION_END, lambda body: _parse(opening + body + _FUNCTION_END, schemas), needs_closing=True
        )

    def instruction(self, tools: Sequence[Tool]) -> str:
        """The functions as JSON, then the form of a call."""
        listed = "\n".join(dumps(tool_json(tool)) for tool in tools)
        form = f"{_OPENING}\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n{_CLOSING}"
        return (
            f"You have access to these functions:\n<tools>\n{listed}\n</tools>\n\n"
            f"To call a function, write in this form:\n{form}"
        )

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls as tags."""
        return "\n".join(map(_written, calls))

    def answered(self, message: Message) -> str:
        """The result between `<tool_response>` and `</tool_response>`."""
        return f"<tool_response>\n{message.text}\n</tool_response>"

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """Parameters in the schema's order; those that are not required may be left out."""
        between = (Literal("\n"), Marker(_CLOSING), Literal("\n"), Marker(_OPENING), Literal("\n"))
        return CallForm(
            (Marker(_OPENING), Literal("\n")),
            tuple(map(_form, tools)),
            between,
            (Literal("\n"), Marker(_CLOSING)),
            frozenset().union(*map(_left_out, tools)),
        )


def _written(call: ToolCall) -> str:
    arguments = call.parsed()
    values = arguments.items() if isinstance(arguments, dict) else ()
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else dumps(value)}\n</parameter>\n"
        for key, value in values
    )
    return f"{_OPENING}\n<function={call.name}>\n{parameters}</function>\n{_CLOSING}"


def _parse(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> tuple[RawCall, ...] | None:
    calls = [(match[1].strip(), match[2]) for match in _CALL.finditer(body)]
    understood = not _CALL.sub("", body).strip() and not any(_PARAMETER.sub("", b).strip() for _, b in calls)
    if not calls or not understood:
        return None
    return tuple(_call(name, values, schemas.get(name, {})) for name, values in calls)


def _call(name: str, values: str, schema: Mapping[str, Any]) -> RawCall:
    properties = schema.get("properties")
    typed = properties if isinstance(properties, dict) else {}
    written = ((key.strip(), value) for key, value in _PARAMETER.findall(values))
    return RawCall(name, dumps({key: _cast(value, typed.get(key)) for key, value in written}))


def _cast(written: str, schema: Any) -> Any:
    """The value that a text stands for: a string where one is allowed, else JSON, else the text."""
    text = written.removeprefix("\n").removesuffix("\n")
    if _allows_text(schema):
        return text
    literal = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    value = read_json(literal)
    return value if value is not None or literal.strip() == "null" else text


def _allows_text(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    if isinstance(options := schema.get("anyOf") or schema.get("oneOf"), list):
        return any(map(_allows_text, options))
    if isinstance(values := schema.get("enum"), list):
        return any(isinstance(value, str) for value in values)
    kinds = schema.get("type")
    return "string" in kinds if isinstance(kinds, list) else kinds == "string"


def _form(tool: Tool) -> Form:
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    named = properties if isinstance(properties, dict) else {}
    parts: list[Part] = [Literal(f"<function={tool.name}>\n")]
    for key, schema in named.items():
        value = _value(schema, tool.parameters)
        parameter: Form = (Literal(f"<parameter={key}>\n"), value, Literal("\n</parameter>\n"))
        parts += parameter if isinstance(required, list) and key in required else (Maybe(parameter),)
    return (*parts, Literal("</function>"))


def _value(schema: Any, root: Mapping[str, Any]) -> Part:
    """Texts stand as they are, everything else is JSON. Of a text only its enumeration is enforced."""
    if not isinstance(schema, dict):
        return Json({})
    options = _texts(schema)
    if options:
        return Choice(tuple((Literal(option),) for option in options))
    if _allows_text(schema):
        return Pattern(_TEXT)
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return Json({**schema, **definitions})


def _texts(schema: Mapping[str, Any]) -> list[str]:
    """The texts of an enumeration of nothing else."""
    options = schema.get("enum")
    return options if isinstance(options, list) and all(isinstance(each, str) for each in options) else []


def _left_out(tool: Tool) -> frozenset[str]:
    found = object_strays(tool.parameters)
    properties = tool.parameters.get("properties")
    for schema in properties.values() if isinstance(properties, dict) else ():
        if _allows_text(schema):
            found |= strays(schema, "type", *(("enum",) if _texts(schema) else ()))
            found |= {"type"} if schema.get("type") not in ("string", None) else frozenset()
    return found
