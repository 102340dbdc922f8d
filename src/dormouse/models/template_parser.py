"""Replies read by the response template that a model brings along, with transformers' own parser.

That parser raises over what it cannot read and has then lost it, so it is fed one character at a time and
what it has not given back yet is kept here, to come out as text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from dormouse.domain.conversation import Called, Piece, Said, Thought, Tool, ToolCall, joined
from dormouse.models.reply_parser import new_call_id
from dormouse.models.tool_formats.base import RawCall, raw_call, tool_json

_SPOKEN = frozenset({"content"})
_THOUGHT = frozenset({"reasoning", "reasoning_content", "thinking"})


class TemplateParser:
    """Reads by a response template. Implements `ReplyParser`.

    `tools` are those that may be called; a call of any other, or one that cannot be read, is text.
    """

    def __init__(
        self,
        template: ResponseTemplate,
        prompt_text: str,
        tools: Sequence[Tool],
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._template = template
        self._tools = [tool_json(tool) for tool in tools]
        self._names = frozenset(tool.name for tool in tools)
        self._new_id = new_id
        self._parser = self._new_parser(prompt_text)
        # What was fed since something was last given back, markers included.
        self._kept = ""

    def push(self, text: str) -> list[Piece]:
        """What is certain after `text`."""
        pieces: list[Piece] = []
        for character in text:
            self._kept += character
            self._read(pieces, partial(self._parser.feed, character))
        return joined(pieces)

    def finish(self) -> list[Piece]:
        """What was held back. Ends the reply."""
        pieces: list[Piece] = []
        self._read(pieces, lambda: self._parser.finalize()[1])
        return joined(pieces)

    def _read(self, pieces: list[Piece], events: Callable[[], list[dict[str, Any]]]) -> None:
        try:
            for event in events():
                self._take(pieces, event)
        except (ValueError, KeyError, RecursionError):
            self._release(pieces)
            self._parser = self._new_parser("")

    def _new_parser(self, prefix: str) -> ResponseParser:
        tools: list[dict[str, Any] | Callable[..., Any]] = [*self._tools]
        return ResponseParser(self._template, prefix=prefix, tools=tools)

    def _take(self, pieces: list[Piece], event: Mapping[str, Any]) -> None:
        kind, name = event["type"], event["field"]
        if name in _SPOKEN or name in _THOUGHT:
            if kind == "region_chunk":
                pieces.append(Said(event["text"]) if name in _SPOKEN else Thought(event["text"]))
                self._kept = self._kept.partition(event["text"])[2]
            elif kind == "region_close" and name in _THOUGHT:
                self._kept = ""  # the marker; text ends without one, where the next region begins
        elif kind == "region_close":
            self._close(pieces, event["value"])

    def _close(self, pieces: list[Piece], value: Any) -> None:
        calls = [_call(each) for each in (value if isinstance(value, list) else [value])]
        read = [call for call in calls if call is not None and call.name in self._names]
        if not read or len(read) < len(calls):
            self._release(pieces)
            return
        pieces += [Called(ToolCall(self._new_id(), call.name, call.arguments)) for call in read]
        self._kept = ""

    def _release(self, pieces: list[Piece]) -> None:
        """Text exactly as it was generated."""
        if self._kept:
            pieces.append(Said(self._kept))
        self._kept = ""


def _call(value: Any) -> RawCall | None:
    """A call as transformers gives it."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return raw_call(function, "arguments", "parameters")
