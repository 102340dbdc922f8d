"""Speculation without a second model: what follows is guessed to be what followed the last time.

Agents quote their context all the time: files, logs, their own earlier words. A draft of guessed tokens is
computed in one step with the token that is due, and as much of it is kept as sampling comes to by itself,
so no guess ever changes a reply; it only costs rows. Every guess is judged by the token that comes,
computed or not, so a sequence that begins to quote is noticed, and one that stops costs nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GRAM = 3
"""Tokens that must be alike before a guess is made; with two, most guesses are wrong."""

_TOKEN_BITS = 21
"""Room for the largest vocabularies, three to a 64-bit word."""

_MOST_INDEXED = 4096
"""Prompt tokens indexed at a time: 0.4 ms, so that no stream waits for another one's long prompt."""

_FIRST_CHANCE = 0.5
_MEMORY = 8
"""About this many of the latest guesses count."""

# What a step costs by its rows, in steps of one row, by `python -m benchmarks.rows`: up to 4 rows it is
# the reading of the weights that takes the time, from there on each row adds its own (8 rows: 1.6, 16
# rows: 3.1, 32 rows: 5.1; with weights in bf16 it is less). Take them again when the kernels change.
_FREE_ROWS = 4
_ROW_COST = 0.155

_LEAST_CHANCE = 0.2
"""A guess that is less likely is not worth its sampling, even where its row is free."""

MOST_DRAFTED = 15
"""Guesses of one sequence in a step."""

_MOST_ROWS = 24
"""Guesses of a step: beside a full budget of prompt tokens they make it 5% longer at most."""


class Drafter:
    """Guesses one sequence's next tokens. `chance` is how likely a guess is right, of late."""

    def __init__(self) -> None:
        self.chance = _FIRST_CHANCE
        # The position behind the latest occurrence of each three tokens, packed into one number.
        self._behind: dict[int, int] = {}
        self._num_read = 0
        self._source: int | None = None

    def read(self, tokens: Sequence[int], num_prompt: int) -> None:
        """Judge the last guess by what came in `tokens` since the last call, and guess anew.

        A long prompt takes several calls.
        """
        if self._num_read < num_prompt:
            self._read_prompt(tokens, min(num_prompt, self._num_read + _MOST_INDEXED))
        if self._num_read >= num_prompt:
            for end in range(self._num_read + 1, len(tokens) + 1):
                self._read_token(tokens, end)

    def draft(self, tokens: Sequence[int], length: int) -> tuple[int, ...]:
        """The next `length` tokens as guessed, or none. A run that reaches the present repeats itself."""
        if self._source is None:
            return ()
        period = len(tokens) - self._source
        return tuple(tokens[self._source + offset % period] for offset in range(length))

    @property
    def has_guess(self) -> bool:
        """Whether `draft` would give any."""
        return self._source is not None

    def _read_token(self, tokens: Sequence[int], end: int) -> None:
        if self._source is not None:
            right = tokens[self._source] == tokens[end - 1]
            self.chance += (right - self.chance) / _MEMORY
            # A run that holds goes on where it is: a later occurrence may be of something else.
            self._source = self._source + 1 if right else None
        if end >= _GRAM:
            a, b, c = tokens[end - _GRAM : end]
            self._note((a << 2 * _TOKEN_BITS) | (b << _TOKEN_BITS) | c, end)
        self._num_read = end

    def _read_prompt(self, tokens: Sequence[int], end: int) -> None:
        run = np.array(tokens[max(0, self._num_read - _GRAM + 1) : end], dtype=np.int64)
        if len(run) >= _GRAM:
            grams = ((run[:-2] << 2 * _TOKEN_BITS) | (run[1:-1] << _TOKEN_BITS) | run[2:]).tolist()
            self._behind.update(zip(grams[:-1], range(end - len(grams) + 1, end), strict=True))
            self._source = None
            self._note(grams[-1], end)
        self._num_read = end

    def _note(self, gram: int, end: int) -> None:
        """Three tokens were read that end at `end`: where did they stand before?"""
        if self._source is None:
            self._source = self._behind.get(gram)
        self._behind[gram] = end


def draft_lengths(
    chances: Sequence[float], rooms: Sequence[int], num_decoding: int, num_prefill: int
) -> list[int]:
    """How many guesses of each sequence to compute, on top of `num_decoding` and `num_prefill` rows.

    The n-th guess of a sequence comes to be used with `chance ** n`. One is computed while it is likelier
    than what its row costs in tokens of the step, and while there is room for it.
    """
    lengths = [0] * len(chances)
    likely = list(chances)
    num_rows, num_tokens = num_decoding + num_prefill, float(num_decoding)
    growing = [index for index, room in enumerate(rooms) if room > 0]
    while growing:
        for index in growing.copy():
            if likely[index] < _price(num_rows, num_tokens) or sum(lengths) == _MOST_ROWS:
                growing.remove(index)
                continue
            lengths[index] += 1
            num_rows += 1
            num_tokens += likely[index]
            likely[index] *= chances[index]
            if lengths[index] == rooms[index]:
                growing.remove(index)
    return lengths


def _price(num_rows: int, num_tokens: float) -> float:
    """What one more row costs, in tokens of a step that gives `num_tokens` with `num_rows` rows."""
    if num_rows < _FREE_ROWS:
        return _LEAST_CHANCE
    cost = 1 + _ROW_COST * (num_rows - _FREE_ROWS)
    return max(_LEAST_CHANCE, num_tokens * _ROW_COST / cost)
