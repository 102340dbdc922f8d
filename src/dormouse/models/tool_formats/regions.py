"""Readers of what follows an opening marker."""

from __future__ import annotations

import re
from collections.abc import Callable

import regex

from dormouse.models.tool_formats.base import RawCall, RegionEnd

Parse = Callable[[str], tuple[RawCall, ...] | None]
"""Calls of a region's body; None when it is none."""

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')


class JsonScanner:
    """Finds the end of a JSON object or list, however it is cut. Does not judge what is inside."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def in_string(self) -> bool:
        """Whether what was read ends inside a string."""
        return self._in_string

    def push(self, text: str) -> int | None:
        """Where in `text` the value ends; None while it goes on."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_STRING_END if self._in_string else _STRUCTURE).search(text, at)
            if found is None:
                return None
            at = found.end()
            if found[0] == "\\":
                self._escaped = True
            elif found[0] == '"':
                self._in_string = not self._in_string
            elif found[0] in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None


class Delimited:
    """A body up to a closing marker, which a reply may end without, unless `needs_closing`.

    A marker inside a JSON string is part of the body, where `is_json` says that the body is JSON.
    """

    def __init__(
        self, closing: str, parse: Parse, *, is_json: bool = False, needs_closing: bool = False
    ) -> None:
        self._closing = closing
        self._parse = parse
        self._is_json = is_json
        self._needs_closing = needs_closing
        self._body = ""
        self._searched = 0

    def push(self, text: str) -> RegionEnd | None:
        """The end at the first closing marker that is one."""
        self._body += text
        while (at := self._body.find(self._closing, self._searched)) >= 0:
            body, end = self._body[:at], at + len(self._closing)
            calls = self._parse(body)
            if calls is not None or not (self._is_json and _ends_in_string(body)):
                return RegionEnd(calls or (), self._body[end:])
            self._searched = end
        self._searched = max(self._searched, len(self._body) - len(self._closing) + 1)
        return None

    def finish(self) -> tuple[RawCall, ...]:
        """Models forget the closing marker; a whole body is a call without it."""
        return () if self._needs_closing else self._parse(self._body) or ()


class JsonRegion:
    """A JSON object or list behind `head`, a pattern that ends with the bracket that opens it. The region
    ends with the value. `parse` gets what the head matched, without the bracket, and the value."""

    def __init__(
        self, head: regex.Pattern[str], parse: Callable[[str, str], tuple[RawCall, ...] | None]
    ) -> None:
        self._head = head
        self._parse = parse
        self._body = ""
        self._value_at: int | None = None
        self._scanner = JsonScanner()

    def push(self, text: str) -> RegionEnd | None:
        """The end where the JSON value ends, or where none can come any more."""
        scanned = len(self._body)
        self._body += text
        if self._value_at is None:
            found = self._head.match(self._body, partial=True)
            if found is None:
                return RegionEnd((), self._body)
            if found.partial:
                return None
            self._value_at = scanned = found.end() - 1
        end = self._scanner.push(self._body[scanned:])
        if end is None:
            return None
        end += scanned
        head, value = self._body[: self._value_at], self._body[self._value_at : end]
        return RegionEnd(self._parse(head, value) or (), self._body[end:])

    def finish(self) -> tuple[RawCall, ...]:
        """A value that has no end is no call."""
        return ()


def _ends_in_string(body: str) -> bool:
    scanner = JsonScanner()
    scanner.push(body)
    return scanner.in_string
