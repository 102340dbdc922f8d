"""What a soak measured, from its attempts and samples: latencies, memory, hits, and samples thinned out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.compare.rows import percentile
from benchmarks.soak.replies import Attempt, Outcome
from benchmarks.soak.samples import Sample

_SHARES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
_TENTH = 0.1
_KEPT_SAMPLES = 180
_LEAST_SPAN_S = 60.0


def normal(attempts: Iterable[Attempt], reply_tokens: int) -> list[Attempt]:
    """The whole replies of normal size that were given while there was no crowd."""
    return [a for a in answered(attempts) if a.max_tokens == reply_tokens]


def answered(attempts: Iterable[Attempt]) -> list[Attempt]:
    """What was answered while there was no crowd; replies of the crowd itself and of twins are none."""
    return [
        a for a in attempts if a.outcome is Outcome.OK and not a.in_crowd and a.kind not in ("crowd", "twin")
    ]


def latencies(attempts: Sequence[Attempt], reply_tokens: int) -> dict[str, Any]:
    """Percentiles in seconds and milliseconds, over all kinds and by kind, and of those in a crowd."""
    calm = answered(attempts)
    crowded = [a for a in attempts if a.outcome is Outcome.OK and a.in_crowd]
    kinds = sorted({a.kind for a in calm})
    return {
        "first_token_s": _percentiles([a.first_s for a in calm if a.first_s is not None], 3),
        "gap_ms": _percentiles([gap for a in calm for gap in a.gaps_ms], 1),
        "reply_s": _percentiles([a.total_s for a in normal(attempts, reply_tokens)], 3),
        "first_token_s_by_kind": {
            kind: _percentiles([a.first_s for a in calm if a.kind == kind and a.first_s is not None], 3)
            for kind in kinds
        },
        "first_token_s_in_a_crowd": _percentiles([a.first_s for a in crowded if a.first_s is not None], 3),
    }


def outcomes(attempts: Iterable[Attempt]) -> dict[str, dict[str, int]]:
    """How many attempts of each kind ended how."""
    counts: dict[str, Counter[str]] = {}
    for attempt in attempts:
        counts.setdefault(attempt.kind, Counter())[attempt.outcome.value] += 1
    return {kind: dict(sorted(count.items())) for kind, count in sorted(counts.items())}


def errors(attempts: Iterable[Attempt]) -> list[str]:
    """What nobody meant, as sentences."""
    return [
        f"{a.at:.0f} s, {a.agent}, {a.dialect}: {a.detail}" for a in attempts if a.outcome is Outcome.ERROR
    ]


def hits(samples: Sequence[Sample], attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Prompt tokens by where they were found, of all lives, as of the last sample of each. The share that
    clients were told of is of the replies they had to the end."""
    last = {sample.life: sample for sample in samples}
    tokens = {
        source: sum(sample.tokens[source] for sample in last.values())
        for source in ("memory", "disk", "computed", "generated")
    }
    prompt = tokens["memory"] + tokens["disk"] + tokens["computed"]
    told = [a for a in attempts if a.outcome is Outcome.OK and a.kind != "twin"]
    told_prompt = sum(a.prompt_tokens for a in told)
    shares = {
        f"{source}_percent": _percent(tokens[source], prompt) for source in ("memory", "disk", "computed")
    }
    told_percent = _percent(sum(a.cached_tokens for a in told), told_prompt)
    return {"tokens": tokens, **shares, "told_cached_percent": told_percent}


def growth(samples: Sequence[Sample], begin: float, end: float) -> dict[str, Any] | None:
    """Of resident memory (the arena counted whole) between two times of the run: the median of the last tenth
    against that of the first. None where either has no sample, or there is too little between them."""
    if end - begin < _LEAST_SPAN_S:
        return None
    tenth = _TENTH * (end - begin)
    first = [s for s in samples if begin <= s.at <= begin + tenth]
    last = [s for s in samples if end - tenth <= s.at <= end]
    if not first or not last:
        return None
    before, after = (statistics.median(s.resident for s in some) for some in (first, last))
    private = [statistics.median(s.anonymous - s.arena_touched for s in some) for some in (first, last)]
    return {
        "from_s": round(begin),
        "to_s": round(end),
        "resident_mib": [round(before, 1), round(after, 1)],
        "private_beyond_arena_mib": [round(value, 1) for value in private],
        "threads": [_median_of(first, "threads"), _median_of(last, "threads")],
        "descriptors": [_median_of(first, "descriptors"), _median_of(last, "descriptors")],
        "percent": round(100 * (after / before - 1), 2),
    }


def memory(samples: Sequence[Sample], seconds: float, warm_up_s: float) -> dict[str, Any]:
    """Growth over the whole run and over the longest life of the server. Samples of a server younger than
    the warm-up do not count."""
    warm = [sample for sample in samples if sample.age >= warm_up_s and sample.is_calm]
    found: dict[str, Any] = {"warm_up_s": round(warm_up_s)}
    if not warm:
        return found | {"run": None, "longest_life": None}
    found["run"] = growth(warm, warm[0].at, min(seconds, warm[-1].at))
    lives = {life: [s for s in warm if s.life == life] for life in {s.life for s in warm}}
    longest = max(lives.values(), key=lambda some: some[-1].at - some[0].at)
    return found | {"longest_life": growth(longest, longest[0].at, longest[-1].at)}


def thinned(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Evenly many of the samples."""
    step = max(1, -(-len(samples) // _KEPT_SAMPLES))
    return [sample.as_json() for sample in samples[::step]]


def by_minute(attempts: Sequence[Attempt], reply_tokens: int) -> list[dict[str, Any]]:
    """Normal replies of each minute: how many, and percentiles of their times."""
    minutes: dict[int, list[Attempt]] = {}
    for attempt in normal(attempts, reply_tokens):
        minutes.setdefault(int(attempt.at // 60), []).append(attempt)
    return [
        {
            "minute": minute,
            "replies": len(some),
            "first_token_s": _percentiles([a.first_s for a in some if a.first_s is not None], 3),
            "reply_s": _percentiles([a.total_s for a in some], 3),
        }
        for minute, some in sorted(minutes.items())
    ]


def _percentiles(values: list[float], digits: int) -> dict[str, float]:
    found = {name: round(percentile(values, share), digits) for name, share in _SHARES} if values else {}
    return found | {"n": len(values)}


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def _median_of(samples: Sequence[Sample], name: str) -> float:
    values: list[float] = [getattr(sample, name) for sample in samples]
    return statistics.median(values)
