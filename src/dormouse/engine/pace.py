"""How many prompt tokens a step may take beside streams that decode: so many that these hardly notice.

Measured, not configured: the cost of a token depends on model, machine and context. What a step computes is
row invariant, so that its size changes no result.
"""

from __future__ import annotations

MOST_STEPS = 2.0
"""A step with prompt tokens aims at so many times an ordinary decode step: below three with much noise."""

LEAST = 16
"""Fewer tokens would read the whole context for too little; prompts must go on, too."""

_GOOD_NEWS, _BAD_NEWS = 0.1, 0.4
"""Weight of the newest measurement in the running means: what makes budgets smaller is believed sooner.

Tokens become dearer as the context of a prompt grows, and on a shared machine some steps take far longer.
"""


class Pace:
    """Owned by the engine thread. `token_budget` bounds the prompt tokens of every step."""

    def __init__(self, token_budget: int) -> None:
        self._token_budget = token_budget
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def budget(self, num_decoding: int) -> int:
        """Prompt tokens for a step beside `num_decoding` streams."""
        if not num_decoding or self._decode_s is None or self._token_s is None:
            return self._token_budget
        affordable = int((MOST_STEPS - 1) * self._decode_s / self._token_s)
        return min(self._token_budget, max(LEAST, affordable))

    def observe(self, num_decoding: int, num_prompt: int, seconds: float) -> None:
        """A step of so many streams and prompt tokens took `seconds`."""
        if num_prompt:
            beside = self._decode_s or 0.0 if num_decoding else 0.0
            # Never nothing: a step may be quicker than the streams alone were on average.
            token_s = max(seconds - beside, 0.1 * seconds) / num_prompt
            self._token_s = _mean(self._token_s, token_s, rise=_BAD_NEWS, fall=_GOOD_NEWS)
        elif num_decoding:
            self._decode_s = _mean(self._decode_s, seconds, rise=_GOOD_NEWS, fall=_BAD_NEWS)


def _mean(before: float | None, value: float, *, rise: float, fall: float) -> float:
    if before is None:
        return value
    return before + (rise if value > before else fall) * (value - before)
