"""FunctionGemma and Gemma 4: `call:name{key:value}` between two markers, texts between two more."""

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
    Literal,
    Marker,
    Maybe,
    Part,
    Pattern,
    RawCall,
    Region,
    Repeated,
    dumps,
    object_strays,
    strays,
    tool_json,
)
from dormouse.models.tool_formats.regions import Delimited

_NAME = re.compile(r"\s*call:([\w.-]+)\s*")
_KEY = re.compile(r"\s*([\w.$-]+)\s*:\s*")
_WORD = re.compile(r"[^,\[\]{}\s]+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class FunctionGemma:
    """`opening` and `closing` enclose a call, `quote` stands on both sides of a text."""

    opening: str = "<start_function_call>"
    closing: str = "<end_function_call>"
    quote: str = "<escape>"
    opens_bare: bool = False
    gap: str = " \t\r\n"
    call_id_length: int | None = None

    @property
    def openings(self) -> tuple[str, ...]:
        """The one that begins a call."""
        return (self.opening,)

    @property
    def markers(self) -> tuple[str, ...]:
        """Those around a call and around texts."""
        return (self.opening, self.closing, self.quote)

    def region(self, _opening: str, _tools: Sequence[Tool]) -> Region:
        """Up to the closing marker."""
        return Delimited(self.closing, self._parse)

    def instruction(self, tools: Sequence[Tool]) -> str:
        """The functions as JSON, then the form of a call."""
        listed = "\n".join(dumps(tool_json(tool)) for tool in tools)
        form = f"{self.opening}call:name{{key:{self.quote}text{self.quote},other:1}}{self.closing}"
        return f"You have access to these functions:\n{listed}\n\nTo call one, write in this form:\n{form}"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls between their markers."""
        return "".join(
            f"{self.opening}call:{call.name}{self._literal(call.parsed())}{self.closing}" for call in calls
        )

    def answered(self, message: Message) -> str:
        """The result between its markers."""
        name = message.name or "tool"
        result = self._literal({"result": message.text})
        return f"<start_function_response>response:{name}{result}<end_function_response>"

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """Arguments in the schema's order; those that are not required may be left out."""
        calls = tuple((Literal(f"call:{tool.name}"), *self._object(tool.parameters)) for tool in tools)
        opening, closing = Marker(self.opening), Marker(self.closing)
        left_out: frozenset[str] = frozenset().union(*(_left_out(tool.parameters) for tool in tools))
        return CallForm((opening,), calls, (closing, opening), (closing,), left_out)

    # -- writing -------------------------------------------------------------------------------

    def _literal(self, value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self._literal(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(self._literal, value)) + "]"
        return f"{self.quote}{value}{self.quote}" if isinstance(value, str) else dumps(value)

    # -- reading -------------------------------------------------------------------------------

    def _parse(self, body: str) -> tuple[RawCall, ...] | None:
        name = _NAME.match(body)
        if name is None:
            return None
        try:
            value, end = self._value(body, name.end(), 0)
        except ValueError:
            return None
        if not isinstance(value, dict) or body[end:].strip():
            return None
        return (RawCall(name[1], dumps(value)),)

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        """The value at `at` and where it ends. Raises ValueError."""
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        if text.startswith(self.quote, at):
            start = at + len(self.quote)
            end = text.index(self.quote, start)
            return text[start:end], end + len(self.quote)
        if text.startswith("{", at):
            return self._read_object(text, at + 1, depth)
        if text.startswith("[", at):
            return self._read_list(text, at + 1, depth)
        word = _WORD.match(text, at)
        if word is None:
            raise ValueError("no value")
        return _plain(word[0]), word.end()

    def _read_object(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        items: dict[str, Any] = {}
        while not text.startswith("}", at := _skip(text, at)):
            key = _KEY.match(text, at)
            if key is None:
                raise ValueError("no key")
            items[key[1]], at = self._value(text, key.end(), depth + 1)
            at = _comma(text, at, "}")
        return items, at + 1

    def _read_list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        while not text.startswith("]", at := _skip(text, at)):
            item, at = self._value(text, at, depth + 1)
            items.append(item)
            at = _comma(text, at, "]")
        return items, at + 1

    # -- enforcing -----------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any]) -> Form:
        """The form of an object. Which arguments stand in front decides about commas, so each one that
        may be left out brings its own."""
        properties = schema.get("properties")
        required = schema.get("required")
        named = properties if isinstance(properties, dict) else {}
        needed = [key for key in named if isinstance(required, list) and key in required]
        optional = [key for key in named if key not in needed]
        parts: list[Part] = [Literal("{")]
        for index, key in enumerate(needed):
            parts += [Literal(("," if index else "") + f"{key}:"), *self._form(named[key])]
        if needed:
            parts += [Maybe((Literal(f",{key}:"), *self._form(named[key]))) for key in optional]
        elif optional:
            parts.append(
                Maybe((Choice(tuple(self._from(optional[i:], named) for i in range(len(optional)))),))
            )
        return (*parts, Literal("}"))

    def _from(self, keys: Sequence[str], named: Mapping[str, Any]) -> Form:
        """The first of `keys`, then any of the others."""
        more = (Maybe((Literal(f",{key}:"), *self._form(named[key]))) for key in keys[1:])
        return (Literal(f"{keys[0]}:"), *self._form(named[keys[0]]), *more)

    def _form(self, schema: Any) -> Form:
        """What stands for a value: numbers, truth values, texts, and objects of these. Anything else is
        a text."""
        schema = schema if isinstance(schema, dict) else {}
        options = schema.get("enum")
        if isinstance(options, list) and options:
            return (Choice(tuple(map(self._quoted, options))),)
        plain = {
            "integer": r"-?(0|[1-9][0-9]{0,17})",
            "number": r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?",
            "boolean": r"true|false",
            "null": r"null",
        }
        kind = schema.get("type")
        if kind == "object" and isinstance(schema.get("properties"), dict):
            return self._object(schema)
        if kind == "array":
            item = self._form(schema.get("items"))
            more = Repeated((Literal(","), *item))
            return (Literal("["), Maybe((*item, more)), Literal("]"))
        if isinstance(kind, str) and kind in plain:
            return (Pattern(plain[kind]),)
        return (Marker(self.quote), Pattern(r"(?s:.*)"), Marker(self.quote))

    def _quoted(self, value: Any) -> Form:
        if isinstance(value, str):
            return (Marker(self.quote), Literal(value), Marker(self.quote))
        return (Literal(self._literal(value)),)


def _left_out(schema: Any) -> frozenset[str]:
    """What `_form` and `_object` do not look at."""
    if not isinstance(schema, dict):
        return frozenset()
    kind = schema.get("type")
    if kind == "object":
        properties = schema.get("properties")
        named = properties.values() if isinstance(properties, dict) else ()
        return object_strays(schema).union(*map(_left_out, named))
    if kind == "array":
        return strays(schema, "type", "items") | _left_out(schema.get("items"))
    known = ("type", "enum") if isinstance(kind, str) else ("enum",)
    return strays(schema, *known) | (frozenset() if isinstance(kind, str) or "enum" in schema else {"type"})


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _comma(text: str, at: int, closing: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return at + 1
    if text.startswith(closing, at):
        return at
    raise ValueError("no comma")


def _plain(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if _NUMBER.fullmatch(word):
        return float(word) if set(word) & set(".eE") else int(word)
    return word
