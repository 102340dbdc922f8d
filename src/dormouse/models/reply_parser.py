"""A reply as it comes, apart into what was said, what was thought and which tools were called.

Text that cannot become markup leaves at once; what may be the beginning of a marker waits. A region that
turns out not to be a call of an offered tool comes out as text exactly as it was generated: a client could
not run it, and its user should see what the model did. White space next to markup belongs to the markup.
Pieces do not depend on how the text was cut.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dormouse.domain.conversation import Called, Piece, Said, Thought, Tool, ToolCall
from dormouse.models.tool_formats.base import RawCall, Region, RegionEnd, ToolFormat

_WHITE = " \t\r\n"
_ID_LENGTH = 24
_ALPHABET = string.ascii_letters + string.digits


class ReplyParser(Protocol):
    """Reads one reply. Belongs to it."""

    def push(self, text: str) -> list[Piece]:
        """What is certain after `text`."""

    def finish(self) -> list[Piece]:
        """What was held back. Ends the reply."""


@dataclass(frozen=True, slots=True)
class ThinkingMarkers:
    """What stands around a model's reasoning."""

    opening: str
    closing: str


def new_call_id() -> str:
    """`call_` and letters and digits at random."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))


class FormatParser:
    """Reads by a tool format and by the markers around reasoning.

    `tools` are those that may be called, none of them where nothing is to be parsed as a call; with
    `is_thinking` the prompt ends inside the reasoning.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        tools: Sequence[Tool],
        thinking: ThinkingMarkers | None,
        *,
        is_thinking: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._format = tool_format
        self._tools = tuple(tools)
        self._names = frozenset(tool.name for tool in tools)
        self._thinking = thinking
        self._is_thinking = is_thinking
        self._new_id = new_id
        self._buffer = ""
        self._has_said = False
        # White space behind markup is dropped, unless text follows that is no markup.
        self._after_markup = is_thinking
        self._after_call = False
        self._region: Region | None = None
        self._gap, self._opening = "", ""
        # What the region has read, to be shown if it is no call.
        self._read: list[str] = []
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What is certain after `text`."""
        self._buffer += text
        self._advance(final=False)
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back. Ends the reply."""
        self._advance(final=True)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _advance(self, *, final: bool) -> None:
        """Go as far as the buffer allows."""
        going = True
        while going:
            if self._region is not None:
                going = self._read_region(self._region, final=final)
            elif self._is_thinking:
                going = self._read_thought(final=final)
            else:
                going = self._read_text(final=final)

    # -- reasoning -----------------------------------------------------------------------------

    def _read_thought(self, *, final: bool) -> bool:
        """True when the reasoning ended and the buffer has what follows."""
        assert self._thinking is not None
        if self._after_markup:
            self._buffer = self._buffer.lstrip(_WHITE)
            self._after_markup = not self._buffer
        at = self._buffer.find(self._thinking.closing)
        if at >= 0:
            self._think(self._buffer[:at].rstrip(_WHITE))
            self._buffer = self._buffer[at + len(self._thinking.closing) :]
            self._is_thinking, self._after_markup = False, True
            return True
        end = len(self._buffer)
        if not final:
            end = len(self._buffer[: _certain(self._buffer, (self._thinking.closing,))].rstrip(_WHITE))
        self._think(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _think(self, text: str) -> None:
        if text:
            self._pieces.append(Thought(text))

    # -- text ----------------------------------------------------------------------------------

    def _read_text(self, *, final: bool) -> bool:
        """True when a region or the reasoning begins here."""
        gap = self._format.gap if self._after_call else _WHITE
        body = self._buffer.lstrip(gap)
        at_start = not self._has_said and bool(body)
        if at_start and self._tools and self._format.opens_bare and body[0] == "{":
            # The brace is the first of the value, not a marker before it.
            self._open(self._buffer[: -len(body)], "", body)
            return True
        thinking = self._thinking.opening if self._thinking and not self._has_said else None
        if at_start and thinking and body.startswith(thinking):
            self._buffer, self._is_thinking, self._after_markup = body[len(thinking) :], True, True
            return True
        openings = self._format.openings if self._tools else ()
        found = [(at, opening) for opening in openings if (at := self._buffer.find(opening)) >= 0]
        if found:
            at, opening = min(found)
            before, rest = self._buffer[:at], self._buffer[at + len(opening) :]
            said = before.rstrip(_WHITE) if before.strip(gap) else ""
            self._say(said)
            self._open(before[len(said) :], opening, rest)
            return True
        if final:
            # At the end of a reply white space behind markup is the markup's.
            self._say("" if self._after_markup and not self._buffer.strip(_WHITE) else self._buffer)
            self._buffer = ""
        else:
            self._say_certain((*openings, thinking) if thinking else openings, gap)
        return False

    def _say_certain(self, openings: Sequence[str], gap: str) -> None:
        """Say what no marker can begin in, nor white space that a marker may follow."""
        if not openings and not self._after_markup:
            end = len(self._buffer)
        else:
            end = len(self._buffer[: _certain(self._buffer, openings)].rstrip(_WHITE))
            if not self._has_said and not self._buffer[:end].strip(gap):
                return
        self._say(self._buffer[:end])
        self._buffer = self._buffer[end:]

    def _say(self, text: str) -> None:
        if self._after_markup:
            text = text.lstrip(_WHITE)
        if not text:
            return
        self._pieces.append(Said(text))
        self._has_said, self._after_markup, self._after_call = True, False, False

    # -- calls ---------------------------------------------------------------------------------

    def _open(self, gap: str, opening: str, rest: str) -> None:
        """`gap` stood before the marker; it belongs to it if it is one."""
        self._region = self._format.region(opening, self._tools)
        self._gap, self._opening, self._buffer, self._read = gap, opening, rest, []

    def _read_region(self, region: Region, *, final: bool) -> bool:
        """True when the region ended and the buffer has what follows."""
        text, self._buffer = self._buffer, ""
        self._read.append(text)
        end = region.push(text) if text else None
        if end is None and final:
            end = RegionEnd(region.finish(), "")
        if end is None:
            return False
        self._region = None
        if end.calls and all(call.name in self._names for call in end.calls):
            self._call(end.calls)
            self._buffer = end.rest
        else:
            self._undo()
        return True

    def _call(self, calls: Sequence[RawCall]) -> None:
        for call in calls:
            self._pieces.append(Called(ToolCall(self._new_id(), call.name, call.arguments)))
        self._has_said, self._after_markup, self._after_call = False, True, True

    def _undo(self) -> None:
        """It was no call: the marker is text, and what follows is looked at anew."""
        raw = "".join(self._read)
        # A bare brace is no marker, but it would open the same region again.
        marker, self._buffer = (self._opening, raw) if self._opening else (raw[:1], raw[1:])
        self._say(self._gap + marker)


def _certain(text: str, markers: Sequence[str]) -> int:
    """How much of `text` is certain not to be the beginning of one of `markers`."""
    longest = max((len(marker) for marker in markers), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(marker.startswith(text[start:]) for marker in markers):
            return start
    return len(text)
