"""Gemma 3, which has no tokens for tools: a fenced block, JSON as it is asked for or Python as it likes."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

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
from dormouse.models.tool_formats.regions import Delimited

_OPENING, _CLOSING = "```tool_code", "```"


@dataclass(frozen=True, slots=True)
class Gemma3:
    """One JSON object per block."""

    openings: tuple[str, ...] = (_OPENING,)
    markers: tuple[str, ...] = ()
    opens_bare: bool = False
    gap: str = " \t\r\n"
    call_id_length: int | None = None

    def region(self, _opening: str, _tools: Sequence[Tool]) -> Region:
        """Up to the closing fence."""
        return Delimited(_CLOSING, _parse, is_json=True)

    def instruction(self, tools: Sequence[Tool]) -> str:
        """The functions as JSON, then the form of a call."""
        listed = "\n".join(dumps(tool_json(tool)) for tool in tools)
        form = f'{_OPENING}\n{{"name": "function name", "arguments": {{"parameter": "value"}}}}\n{_CLOSING}'
        how = "To call a function, write its name and arguments as JSON in a block of this form:"
        return f"You have access to these functions:\n{listed}\n\n{how}\n{form}"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """A block per call."""
        bodies = [dumps({"name": call.name, "arguments": call.parsed()}) for call in calls]
        return "\n".join(f"{_OPENING}\n{body}\n{_CLOSING}" for body in bodies)

    def answered(self, message: Message) -> str:
        """The result as a block."""
        return f"```tool_output\n{message.text}\n```"

    def call_form(self, tools: Sequence[Tool]) -> CallForm:
        """JSON in blocks."""
        calls = tuple(call_object(tool, "arguments") for tool in tools)
        opening, closing = (Literal(_OPENING), Literal("\n")), (Literal(f"\n{_CLOSING}"),)
        return CallForm(opening, calls, (*closing, Literal("\n"), *opening), closing)


def _parse(body: str) -> tuple[RawCall, ...] | None:
    value = read_json(body)
    return raw_calls(value, "arguments", "parameters") if value is not None else _python(body)


def _python(body: str) -> tuple[RawCall, ...] | None:
    """Calls with literal keyword arguments, one a line, maybe inside of `print(...)`."""
    try:
        statements = ast.parse(body.strip()).body
        calls = tuple(map(_python_call, statements))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return calls or None


def _python_call(statement: ast.stmt) -> RawCall:
    """Raises ValueError for anything else."""
    call = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "print"
        and call.args
    ):
        call = call.args[0]
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise ValueError("not a call with keyword arguments")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("not a keyword argument")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    try:
        return RawCall(call.func.id, dumps(arguments))
    except TypeError as error:
        raise ValueError("not JSON") from error
