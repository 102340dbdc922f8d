"""From logits to a draw, over a batch of rows: what is done to whole rows is done to all of them at once, and
what is left of a row after that, a handful of candidates, is each row's own.

No function lets a row depend on the others: neighbours in the batch change no token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dormouse.domain.requests import SamplingParams, TokenLogprob

Row = NDArray[np.float32]
"""Logits of one token, `[vocab_size]`."""

Rows = NDArray[np.float32]
"""Logits of several tokens, `[rows, vocab_size]`."""

_Ids = NDArray[np.int64]
_Weights = NDArray[np.float64]

_SPAN = 256
"""Weights that are summed up before a draw looks at them one by one."""

_FLOORS = (-2.0, -4.0, -6.0, -9.0)
"""Logits below the best one to look down to, one after the other, for the tokens that top_p keeps."""


def best(rows: Rows) -> tuple[_Ids, Row]:
    """The first of the best tokens of each row, and its logit; NaN where a row has any."""
    ids = rows.argmax(axis=1)
    return ids, rows[np.arange(len(rows)), ids]


def draw(rows: Rows, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """One token per row, by temperature, top_k, top_p, min_p and a uniform number in [0, 1) each.

    `rows` must be finite but for -inf, temperatures above 0. Overwrites `rows`.
    """
    rows -= best(rows)[1][:, None]
    rows /= np.array([p.temperature for p in params], np.float32)[:, None]
    sums = _span_sums(rows, [index for index, p in enumerate(params) if not p.top_k])
    return [
        _draw_one(row, p, uniform, sums.get(index))
        for index, (row, p, uniform) in enumerate(zip(rows, params, uniforms, strict=True))
    ]


def token_logprob(row: Row, token: int, top: int) -> TokenLogprob:
    """Log probability of `token` under `row`, with the `top` most likely tokens, best first."""
    peak = row.max()
    normalizer = float(peak) + math.log(np.exp(row - peak).sum(dtype=np.float64))
    ids = _top_candidates(row, top) if top else np.empty(0, np.int64)
    ids = ids[np.argsort(-row[ids], kind="stable")][:top]
    best_ones = tuple((int(i), float(row[i]) - normalizer) for i in ids)
    return TokenLogprob(token, float(row[token]) - normalizer, best_ones)


def _span_sums(rows: Rows, wanted: list[int]) -> dict[int, _Weights]:
    """Sums of exp(row) over every `_SPAN` tokens, of the `wanted` rows."""
    if not wanted:
        return {}
    vocab_size = rows.shape[1]
    num_spans = -(-vocab_size // _SPAN)
    weights = np.zeros((len(wanted), num_spans * _SPAN), np.float32)
    np.exp(rows if len(wanted) == len(rows) else rows[wanted], out=weights[:, :vocab_size])
    sums = weights.reshape(-1, _SPAN).sum(axis=1, dtype=np.float64).reshape(len(wanted), num_spans)
    return dict(zip(wanted, sums, strict=True))


def _draw_one(row: Row, p: SamplingParams, uniform: float, sums: _Weights | None) -> int:
    """`row` is shifted to a maximum of 0 and divided by the temperature."""
    if sums is None or p.top_p < 1 or p.min_p:
        ids = _candidates(row, p, None if sums is None else float(sums.sum()))
        return int(ids[_pick(_weights(row[ids]), uniform)])
    cumulative = sums.cumsum()
    drawn = uniform * cumulative[-1]
    span = min(int(cumulative.searchsorted(drawn, side="right")), int(sums.nonzero()[0][-1]))
    start = span * _SPAN
    weights = _weights(row[start : start + _SPAN])
    return start + _find(weights, drawn - (cumulative[span - 1] if span else 0.0))


def _candidates(row: Row, p: SamplingParams, total: float | None) -> _Ids:
    """The tokens that top_k, top_p and min_p, in this order, leave; ascending. `total` is the sum of all
    weights, None if top_k makes it unknown."""
    if p.top_k:
        ids = _top_candidates(row, p.top_k)
    elif p.top_p < 1 and total is not None:
        ids = _likely_candidates(row, p.top_p * total)
    else:
        ids = np.flatnonzero(row >= np.log(p.min_p))
    if p.top_p < 1:
        ids = _nucleus(ids, row[ids], p.top_p, total)
    if p.min_p:
        ids = ids[row[ids] >= np.log(p.min_p)]
    return ids


def _top_candidates(row: Row, k: int) -> _Ids:
    """The `k` best tokens and all that are as good as the last of them, ascending."""
    if k >= len(row):
        return np.arange(len(row))
    ids = np.arange(len(row))
    whole = len(row) // _SPAN
    if k <= whole:
        # k spans have a best token of this much at least: so have k tokens.
        peaks = row[: whole * _SPAN].reshape(whole, _SPAN).max(axis=1)
        ids = np.flatnonzero(row >= np.partition(peaks, -k)[-k])
    values = row[ids]
    kept: _Ids = ids[values >= np.partition(values, -k)[-k]]
    return kept


def _likely_candidates(row: Row, mass: float) -> _Ids:
    """Some best tokens, ascending, that weigh `mass` together: to sort them all would take milliseconds."""
    for floor in _FLOORS:
        ids = np.flatnonzero(row >= floor)
        if _weights(row[ids]).sum() >= mass:
            return ids
    return np.arange(len(row))


def _nucleus(ids: _Ids, values: Row, p: float, total: float | None) -> _Ids:
    """The smallest set of best tokens whose probability reaches `p` (arXiv 1904.09751)."""
    falling = np.sort(values)[::-1]
    weights = _weights(falling)
    before = weights.cumsum() - weights
    whole = weights.sum() if total is None else total
    count = max(1, int((before < p * whole).sum()))
    kept = values > falling[count - 1]
    # Of those that are as good as the last one, the first.
    ties = np.flatnonzero(values == falling[count - 1])
    kept[ties[: count - int(kept.sum())]] = True
    nucleus: _Ids = ids[kept]
    return nucleus


def _weights(values: Row) -> _Weights:
    return np.exp(values).astype(np.float64)


def _pick(weights: _Weights, uniform: float) -> int:
    return _find(weights, uniform * weights.cumsum()[-1])


def _find(weights: _Weights, drawn: float) -> int:
    """Where the running sum of `weights` passes `drawn`.

    A draw of exactly a border belongs to the weight behind it: weight zero is never chosen.
    """
    chosen = int(weights.cumsum().searchsorted(drawn, side="right"))
    # Rounding may put it behind the last border.
    return chosen if chosen < len(weights) else int(weights.nonzero()[0][-1])
