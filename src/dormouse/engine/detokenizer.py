"""From tokens to text: incremental decoding, and stop strings that never leak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Turns one reply's tokens into text, one at a time."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""

    def flush(self) -> str:
        """What remains at the end of the reply."""


class Detokenizer:
    """A reply's text, with the part that may become a stop string held back."""

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""

    def step(self, token_id: int) -> tuple[str, str | None]:
        """Text that is safe to show after `token_id`, and the stop string that ended it, if one did."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> tuple[str, str | None]:
        """The rest of the text at the end of the reply, and the stop string in it, if any."""
        text, stop = self._release(self._decoder.flush())
        if stop is None:
            text += self._held
            self._held = ""
        return text, stop

    def _release(self, text: str) -> tuple[str, str | None]:
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, stop = min(found)
            self._held = ""
            return text[:start], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
