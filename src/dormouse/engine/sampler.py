"""The choice of the next tokens: one pass over a step's rows of logits, whoever they belong to.

A request's random stream is its own: one uniform draw per sampled token from a generator seeded by the
request's seed alone, so neighbours in the batch, preemption and restarts of the batch change nothing.
Nor does speculation: a draft is kept as far as the tokens sampled here are the drafted ones.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dormouse.domain.constraint import Constraint
from dormouse.domain.requests import SamplingParams, TokenLogprob
from dormouse.engine import distribution, masks
from dormouse.engine.distribution import Row, Rows

_MIN_TEMPERATURE = 1e-5
"""Below it a division overflows, and nothing but the best token is likely anyway."""

_NOTHING = -1
"""In place of a token that a constraint does not let be."""


class Sampler:
    """What the choice of one request's tokens depends on beside the logits.

    `eos_token_ids` are held down until `min_tokens` were sampled, and always with `ignore_eos`, unless
    `constraint` allows nothing else.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        eos_token_ids: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self._eos = np.fromiter(sorted(eos_token_ids), dtype=np.int64)
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(key=seed))
        self._uniforms: deque[float] = deque()
        penalized = prompt if params.repetition_penalty != 1 else ()
        self._prompt = np.unique(np.asarray(penalized, dtype=np.int64))
        self._generated: Counter[int] = Counter()
        self._bias_ids = np.fromiter((i for i, _ in params.logit_bias), dtype=np.int64)
        self._bias = np.fromiter((b for _, b in params.logit_bias), dtype=np.float32)
        self._num_sampled = 0

    def sample(self, logits: Row) -> tuple[int, TokenLogprob | None]:
        """The next token and, if the request asked, its log probability. May overwrite `logits`."""
        choices = choose(logits[None], [(self, ())])
        token = choices.tokens[0]
        self.took(token)
        return token, choices.logprob(0, self.params.top_logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.params.temperature < _MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether `adjust` does anything."""
        p = self.params
        return bool(
            p.repetition_penalty != 1
            or p.presence_penalty
            or p.frequency_penalty
            or len(self._bias_ids)
            or p.ignore_eos
            or self._num_sampled < p.min_tokens
        )

    def adjust(self, row: Row, drafted: Sequence[int]) -> None:
        """Bias, penalties and held-down end tokens, in place, as if `drafted` had been sampled."""
        p = self.params
        generated = self._generated + Counter(drafted) if drafted else self._generated
        if p.repetition_penalty != 1:
            seen = np.union1d(self._prompt, np.fromiter(generated, dtype=np.int64))
            values = row[seen]
            row[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if p.presence_penalty or p.frequency_penalty:
            ids = np.fromiter(generated, dtype=np.int64)
            counts = np.fromiter(generated.values(), dtype=np.float32)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias
        if p.ignore_eos or self._num_sampled + len(drafted) < p.min_tokens:
            row[self._eos] = -np.inf

    def uniforms(self, count: int) -> list[float]:
        """The next `count` draws. Only `took` uses one up."""
        while len(self._uniforms) < count:
            self._uniforms.append(self._random.random())
        return [self._uniforms[index] for index in range(count)]

    def took(self, token: int) -> None:
        """The reply goes on with `token`."""
        self._num_sampled += 1
        self._generated[token] += 1
        if not self.is_greedy:
            self._uniforms.popleft()


@dataclass(frozen=True, slots=True)
class Choices:
    """A token for each row. It counts if those drafted before it were chosen too, and `is_valid`: the
    model computed numbers. `raw` has the logits of rows that ask for log probabilities, before any
    constraint."""

    tokens: list[int]
    is_valid: list[bool]
    raw: dict[int, Row]

    def is_broken(self, row: int) -> bool:
        """Whether a constraint allowed nothing there, or gave up."""
        return self.tokens[row] == _NOTHING

    def logprob(self, row: int, top: int | None) -> TokenLogprob | None:
        """The log probability of a row's token, if it is asked for."""
        return None if top is None else distribution.token_logprob(self.raw[row], self.tokens[row], top)


def choose(logits: Rows, wanted: Sequence[tuple[Sampler, Sequence[int]] | None]) -> Choices:
    """Sample every row of a step: for each sampler one row, and one more behind each of its drafted tokens.
    For None there is one row as well, of which only `is_valid` is said.

    Overwrites `logits`. Tells no sampler: what is taken of this is for the caller to say. Only a constraint
    is told here, as the next row depends on it; it takes what the caller will take, or the reply ends.
    """
    ids, peaks = distribution.best(logits)
    tokens: list[int] = ids.tolist()
    is_valid: list[bool] = np.isfinite(peaks).tolist()
    raw: dict[int, Row] = {}
    drawn: list[tuple[int, Sampler, float]] = []
    told: list[tuple[int, Constraint]] = []
    first = 0
    for one in wanted:
        if one is None:
            first += 1
            continue
        sampler, draft = one
        rows = range(first, first + len(draft) + 1)
        first = rows.stop
        constraint = sampler.constraint
        adjusts = sampler.changes_logits
        if sampler.params.top_logprobs is not None:
            overwrites = adjusts or not sampler.is_greedy or constraint is not None
            raw |= {row: logits[row].copy() if overwrites else logits[row] for row in rows}
        is_open = True
        if constraint is not None and draft:
            # What may follow a drafted token is known when that token is chosen, not before.
            for row, token in zip(rows, _in_order(logits, rows, constraint, sampler, draft), strict=False):
                tokens[row] = token
            is_open = False
        elif constraint is not None and is_valid[rows.start]:
            tokens[rows.start], is_open = _keep(logits[rows.start], constraint, sampler, ())
            told.append((rows.start, constraint))
        elif adjusts:
            for num_before, row in enumerate(rows):
                sampler.adjust(logits[row], draft[:num_before])
                tokens[row] = int(logits[row].argmax())
        if not sampler.is_greedy:
            uniforms = zip(rows, sampler.uniforms(len(rows)), strict=True)
            drawn += [(row, sampler, uniform) for row, uniform in uniforms if is_open and is_valid[row]]
    if drawn:
        places = [row for row, _, _ in drawn]
        sampled = distribution.draw(
            logits if len(places) == len(logits) else logits[places],
            [sampler.params for _, sampler, _ in drawn],
            [uniform for _, _, uniform in drawn],
        )
        for row, token in zip(places, sampled, strict=True):
            tokens[row] = token
    for row, constraint in told:
        if tokens[row] != _NOTHING and not constraint.took(tokens[row]):
            tokens[row] = _NOTHING
    return Choices(tokens, is_valid, raw)


def _in_order(
    logits: Rows, rows: range, constraint: Constraint, sampler: Sampler, draft: Sequence[int]
) -> Iterator[int]:
    """The tokens of one reply's rows one by one. Ends behind the first that was drafted wrong, or with
    `_NOTHING`."""
    uniforms = [0.0] * len(rows) if sampler.is_greedy else sampler.uniforms(len(rows))
    for row, drafted, uniform in zip(rows, (*draft, None), uniforms, strict=True):
        if not np.isfinite(logits[row].max()):
            return
        token, is_open = _keep(logits[row], constraint, sampler, draft[: row - rows.start])
        if is_open and not sampler.is_greedy:
            token = distribution.draw(logits[row : row + 1], [sampler.params], [uniform])[0]
        if token != _NOTHING and not constraint.took(token):
            token = _NOTHING
        yield token
        if token != drafted:
            return


def _keep(row: Row, constraint: Constraint, sampler: Sampler, drafted: Sequence[int]) -> tuple[int, bool]:
    """Leave in `row` what the constraint allows: the best token, and whether there is another one."""
    allowed = masks.allowed_by(constraint, len(row))
    only = masks.only_one(allowed)
    if only is not None:
        return only, False
    row += masks.penalty(allowed, len(row))
    if sampler.changes_logits:
        before = row.copy()
        sampler.adjust(row, drafted)
        if row.max() == -np.inf:
            row[:] = before  # ends that were held down are all there is
    best = int(row.argmax())
    return (_NOTHING, False) if row[best] == -np.inf else (best, True)
