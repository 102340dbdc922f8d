"""The choice of the next token: small pure steps over one row of logits, composed per request.

A request's random stream is its own: one uniform draw per sampled token from a generator seeded by the
request's seed alone, so neighbours in the batch, preemption and restarts of the batch change nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.requests import SamplingParams, TokenLogprob

Row = NDArray[np.float32]
"""Logits of one token, `[vocab_size]`."""

_MIN_TEMPERATURE = 1e-5
"""Below it a division overflows, and nothing but the best token is likely anyway."""

_Step = Callable[[Row], Row]


class Sampler:
    """Chooses one request's tokens.

    `eos_token_ids` are held down until `min_tokens` were sampled, and always with `ignore_eos`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        eos_token_ids: frozenset[int],
    ) -> None:
        self.params = params
        self._eos = np.fromiter(sorted(eos_token_ids), dtype=np.int64)
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(key=seed))
        self._prompt = np.unique(np.asarray(prompt, dtype=np.int64))
        self._generated: dict[int, int] = {}
        self._bias_ids = np.fromiter((i for i, _ in params.logit_bias), dtype=np.int64)
        self._bias = np.fromiter((b for _, b in params.logit_bias), dtype=np.float32)
        self._num_sampled = 0
        self._filters = _filters(params)

    def sample(self, logits: Row) -> tuple[int, TokenLogprob | None]:
        """The next token and, if the request asked, its log probability. May overwrite `logits`."""
        top = self.params.top_logprobs
        raw = logits.copy() if top is not None else logits
        token = self._choose(self._adjust(logits))
        self._num_sampled += 1
        self._generated[token] = self._generated.get(token, 0) + 1
        return token, None if top is None else token_logprob(raw, token, top)

    def _choose(self, row: Row) -> int:
        if self.params.temperature < _MIN_TEMPERATURE:
            return int(row.argmax())
        row = (row - row.max()) / np.float32(self.params.temperature)
        for keep in self._filters:
            row = keep(row)
        weights = np.exp(row - row.max()).astype(np.float64)
        cumulative = weights.cumsum()
        drawn = self._random.random() * cumulative[-1]
        # A draw of exactly a border belongs to the token behind it: weight zero is never chosen.
        chosen = int(cumulative.searchsorted(drawn, side="right"))
        # The product may round up to the whole sum, behind the last border.
        return chosen if chosen < len(weights) else int(weights.nonzero()[0][-1])

    def _adjust(self, row: Row) -> Row:
        """Bias, penalties and held-down end tokens, in place."""
        p = self.params
        if p.repetition_penalty != 1:
            seen = np.union1d(self._prompt, np.fromiter(self._generated, dtype=np.int64))
            values = row[seen]
            row[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self._generated:
            ids = np.fromiter(self._generated.keys(), dtype=np.int64)
            counts = np.fromiter(self._generated.values(), dtype=np.float32)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias
        if p.ignore_eos or self._num_sampled < p.min_tokens:
            row[self._eos] = -np.inf
        return row


def token_logprob(row: Row, token: int, top: int) -> TokenLogprob:
    """Log probability of `token` under `row`, with the `top` most likely tokens, best first."""
    shifted = row.astype(np.float64) - row.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-logprobs, kind="stable")[:top].tolist() if top else []
    return TokenLogprob(token, float(logprobs[token]), tuple((i, float(logprobs[i])) for i in best))


def _filters(p: SamplingParams) -> tuple[_Step, ...]:
    """The truncations that `p` asks for, in the order top_k, top_p, min_p."""
    steps: list[_Step] = []
    if p.top_k > 0:
        steps.append(lambda row: _keep_top_k(row, p.top_k))
    if p.top_p < 1:
        steps.append(lambda row: _keep_top_p(row, p.top_p))
    if p.min_p > 0:
        steps.append(lambda row: np.where(row < row.max() + np.log(p.min_p), -np.inf, row))
    return tuple(steps)


def _keep_top_k(row: Row, k: int) -> Row:
    if k >= len(row):
        return row
    threshold = np.partition(row, -k)[-k]
    return np.where(row < threshold, -np.inf, row)


def _keep_top_p(row: Row, p: float) -> Row:
    """The smallest set of best tokens whose probability reaches `p` (arXiv 1904.09751)."""
    order = np.argsort(-row, kind="stable")
    weights = np.exp(row[order] - row[order[0]]).astype(np.float64)
    before = weights.cumsum() - weights
    kept = order[: max(1, int((before < p * weights.sum()).sum()))]
    out = np.full_like(row, -np.inf)
    out[kept] = row[kept]
    return out
