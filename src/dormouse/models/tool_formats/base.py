"""What a family of models writes when it calls a tool: how that is asked for, written, read and enforced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dormouse.domain.conversation import Message, Tool, ToolCall

_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call as it was read: not yet given an id, its name not yet compared with the tools.
    `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class RegionEnd:
    """Where a region ends: its calls, none if it is no call after all, and the text behind it."""

    calls: tuple[RawCall, ...]
    rest: str


class Region(Protocol):
    """What follows an opening marker, read as it comes. Where it ends does not depend on how it came."""

    def push(self, text: str) -> RegionEnd | None:
        """None while the end has not come."""

    def finish(self) -> tuple[RawCall, ...]:
        """The reply ended inside. The calls that can be read nevertheless."""


@dataclass(frozen=True, slots=True)
class Literal:
    """Text as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Marker:
    """Text that is a single token where the vocabulary has one for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON value that `schema` allows."""

    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Text that the regular expression `regex` matches (the syntax of Rust's crate, no look-around)."""

    regex: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several forms."""

    options: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Maybe:
    """A form or nothing."""

    form: Form


@dataclass(frozen=True, slots=True)
class Repeated:
    """A form any number of times, none included."""

    form: Form


Part = Literal | Marker | Json | Pattern | Choice | Maybe | Repeated
Form = tuple[Part, ...]
"""What a family writes, for a grammar: one part after the other."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How calls stand in a reply: `opening`, one call, more of them with `separator` between, `closing`.

    `opening` begins with the marker by which calls are told from text. `left_out` are keywords of the tools'
    schemas that these forms do not enforce.
    """

    opening: Form
    calls: tuple[Form, ...]
    separator: Form
    closing: Form
    left_out: frozenset[str] = frozenset()


class ToolFormat(Protocol):
    """One family's way to call tools. Stateless."""

    @property
    def openings(self) -> tuple[str, ...]:
        """Markers that begin a region of calls."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts that mean something to the reader; where they are special tokens, they are shown."""

    @property
    def opens_bare(self) -> bool:
        """Whether a reply that starts with `{` may be a call without a marker."""

    @property
    def gap(self) -> str:
        """Characters that mean nothing between two regions."""

    @property
    def call_id_length(self) -> int | None:
        """How long ids have to be in a prompt, in letters and digits; None where any will do."""

    def region(self, opening: str, tools: Sequence[Tool]) -> Region:
        """A reader of what follows `opening`."""

    def instruction(self, tools: Sequence[Tool]) -> str:
        """Tells a model of `tools` and of how to call them, where its template does not."""

    def written(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model would have written them."""

    def answered(self, message: Message) -> str:
        """A tool's result as text, for templates that know no such role."""

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """The form of calls of `tools`, for a grammar."""


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool as templates and models are used to see it, keys in the client's order."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def dumps(value: Any) -> str:
    """JSON as models are trained on it: Python's spaces, characters as they are, keys in their order.

    Halves of characters, which a model may write as escapes, stay escapes: no answer could hold them.
    """
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if _HALF.search(text) else text


def read_json(text: str) -> Any:
    """A JSON value, None when `text` is none. Numbers that JSON does not have are none, too."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def raw_call(value: Any, *argument_keys: str) -> RawCall | None:
    """A call from `{"name": ..., "arguments": {...}}`; arguments that are a JSON text are unwrapped."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    for key in argument_keys:
        if key in value:
            arguments = read_json(value[key]) if isinstance(value[key], str) else value[key]
            return RawCall(name, dumps(arguments)) if isinstance(arguments, dict) else None
    return RawCall(name, "{}") if set(value) == {"name"} else None


def raw_calls(value: Any, *argument_keys: str) -> tuple[RawCall, ...] | None:
    """One call or a list of them; None when any of it is no call. An empty list is no call."""
    values = value if isinstance(value, list) else [value]
    calls = tuple(call for each in values if (call := raw_call(each, *argument_keys)) is not None)
    return calls if calls and len(calls) == len(values) else None


def call_object(tool: Tool, arguments_key: str) -> Form:
    """The JSON of one call, for a grammar. The arguments' schema stays whole: it may refer to itself."""
    return (Literal(f'{{"name": {dumps(tool.name)}, "{arguments_key}": '), arguments(tool), Literal("}"))


def arguments(tool: Tool) -> Json:
    """The arguments of a call: an object, also where the schema forgets to say so."""
    return Json({"type": "object", **tool.parameters})


def strays(schema: Mapping[str, Any], *known: str) -> frozenset[str]:
    """Keywords of `schema` that are neither `known` nor mere words about it."""
    words = {"$defs", "$schema", "default", "definitions", "deprecated", "description", "examples", "title"}
    return frozenset(schema).difference(words, known)


def object_strays(schema: Mapping[str, Any]) -> frozenset[str]:
    """`strays` of an object that is written by its named properties alone."""
    named, required = schema.get("properties"), schema.get("required")
    unnamed = isinstance(required, list) and not set(required) <= set(named or ())
    found = strays(schema, "type", "properties", "required", "additionalProperties")
    return found | {"required"} if unnamed else found


def _refuse(constant: str) -> None:
    raise ValueError(constant)
