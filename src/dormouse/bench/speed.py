"""Prefill and decode speed of an engine."""

from __future__ import annotations

import statistics
from typing import Any

from dormouse.bench.client import PendingReply, random_prompt
from dormouse.engine.engine import Engine


def prefill(engine: Engine, num_tokens: int, repeat: int) -> dict[str, Any]:
    """Cold prompts of `num_tokens`: submission to first token, one at a time."""
    vocab_size = engine.runtime.spec.vocab_size
    seconds = []
    for seed in range(repeat):
        prompt = random_prompt(seed, num_tokens, vocab_size)
        seconds.append(PendingReply(engine, prompt, 1).wait().ttft_s)
    return {
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / statistics.median(seconds), 1),
        "ttft_ms": spread([1000 * s for s in seconds]),
    }


def decode(engine: Engine, batches: list[int], context: int, new_tokens: int, repeat: int) -> dict[str, Any]:
    """Tokens per second of all streams together, while all of them decode.

    The batches take turns, so that a slow moment of the machine hits them alike.
    """
    rates: dict[int, list[float]] = {batch: [] for batch in batches}
    for seed in range(repeat):
        for batch in batches:
            rates[batch].append(_decode_once(engine, batch, context, new_tokens, seed))
    return {
        "context": context,
        "tokens_per_s": {str(b): round(statistics.median(r), 1) for b, r in rates.items()},
        "spread": {str(b): spread(r) for b, r in rates.items()},
    }


def _decode_once(engine: Engine, batch: int, context: int, new_tokens: int, seed: int) -> float:
    vocab_size = engine.runtime.spec.vocab_size
    prompts = [random_prompt(1000 * (seed + 1) + i, context, vocab_size) for i in range(batch)]
    replies = [p.wait() for p in [PendingReply(engine, prompt, new_tokens) for prompt in prompts]]
    start = max(reply.token_times[0] for reply in replies)
    end = min(reply.token_times[-1] for reply in replies)
    inside = sum(start < moment <= end for reply in replies for moment in reply.token_times)
    return inside / (end - start)


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    """Least, median and greatest, rounded."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }
