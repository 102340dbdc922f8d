"""From tokens to text: incremental decoding, and stop strings that never leak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dormouse.domain.requests import TokenLogprob


class TokenDecoder(Protocol):
    """Turns one reply's tokens into text, one at a time."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""

    def flush(self) -> str:
        """What remains at the end of the reply."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What may be shown now: text, the log probabilities of its tokens, and the stop string that ended
    the reply, if one did."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None


class Detokenizer:
    """A reply's text, with the part that may become a stop string held back, tokens and all."""

    def __init__(self, decoder: TokenDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""
        self._num_decoded = 0
        self._num_shown = 0
        # Log probabilities of tokens that are not shown whole, with where their text ends; None while
        # they have not completed a character.
        self._waiting: list[tuple[int | None, TokenLogprob]] = []

    def step(self, token_id: int, logprob: TokenLogprob | None = None) -> Shown:
        """What may be shown after `token_id`."""
        if logprob is not None:
            self._waiting.append((None, logprob))
        return self._release(self._decoder.push(token_id))

    def flush(self) -> Shown:
        """What is left at the end of the reply."""
        shown = self._release(self._decoder.flush())
        if shown.stop is not None:
            return shown
        rest = Shown(shown.text + self._held, shown.logprobs + tuple(entry for _, entry in self._waiting))
        self._held = ""
        self._waiting = []
        return rest

    def _release(self, piece: str) -> Shown:
        if piece:
            self._num_decoded += len(piece)
            self._waiting = [(end or self._num_decoded, entry) for end, entry in self._waiting]
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, stop = min(found)
            self._held = ""
            return Shown(text[:start], self._logprobs_of(start), stop)
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return Shown(text[: len(text) - keep], self._logprobs_of(len(text) - keep))

    def _logprobs_of(self, num_characters: int) -> tuple[TokenLogprob, ...]:
        """The entries of tokens whose text is shown whole with `num_characters` more."""
        self._num_shown += num_characters
        ready = [entry for end, entry in self._waiting if end is not None and end <= self._num_shown]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
