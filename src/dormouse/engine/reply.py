"""How a reply grows: the tokens that a step gave a sequence, as text, until the reply ends."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from dormouse.domain.errors import DormouseError
from dormouse.domain.requests import FinishReason, TokenLogprob
from dormouse.engine.detokenizer import Shown
from dormouse.engine.sampler import Choices
from dormouse.engine.sequence import Sequence


@dataclass(slots=True)
class Growth:
    """What a step gave a sequence: `num_tokens` tokens, what they show, and why the reply ends, if it
    does. With not `is_valid` the model computed no numbers for the next token, with `is_broken` the reply's
    constraint allows none, and with an `error` its text could not be made."""

    num_tokens: int = 0
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None
    reason: FinishReason | None = None
    is_valid: bool = True
    is_broken: bool = False
    error: DormouseError | None = None

    def show(self, shown: Shown) -> None:
        """Add what may be shown now. A stop string ends the reply."""
        self.text += shown.text
        self.logprobs += shown.logprobs
        if shown.stop is not None:
            self.stop, self.reason = shown.stop, FinishReason.STOP


def grow(
    sequence: Sequence, draft: Seq[int], choices: Choices, first: int, eos_token_ids: frozenset[int]
) -> Growth:
    """Take the token of row `first`, and of each further row while the draft has it right.

    A request for no tokens, which is only to warm up, ends here without any.
    """
    growth = Growth()
    if len(sequence.tokens) >= sequence.max_length:
        growth.reason = FinishReason.LENGTH
    for row, drafted in enumerate((*draft, None), first):
        growth.is_valid = choices.is_valid[row]
        if not growth.is_valid or growth.reason is not None:
            break
        if choices.is_broken(row):
            growth.is_broken = True
            break
        token = choices.tokens[row]
        logprob = choices.logprob(row, sequence.request.sampling.top_logprobs)
        _take(sequence, token, logprob, growth, eos_token_ids)
        if token != drafted:
            break
    return growth


def _take(
    sequence: Sequence, token: int, logprob: TokenLogprob | None, growth: Growth, eos: frozenset[int]
) -> None:
    sequence.sampler.took(token)
    sequence.tokens.append(token)
    growth.num_tokens += 1
    # A grammar lets the end come only where the reply may end, and often nothing else may come.
    ends = not sequence.request.sampling.ignore_eos or sequence.request.constraint is not None
    if token in eos and ends:
        growth.reason = FinishReason.STOP
    else:
        growth.show(sequence.detokenizer.step(token, logprob))
        if growth.reason is None and len(sequence.tokens) >= sequence.max_length:
            growth.reason = FinishReason.LENGTH
    if growth.reason is not None and growth.stop is None:
        growth.show(sequence.detokenizer.flush())
