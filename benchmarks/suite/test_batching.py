"""Many streams in one step: more tokens in all, the same words for each, and room for who comes later."""

from __future__ import annotations

import asyncio
import statistics
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.figures import Scale
from benchmarks.server import Server
from benchmarks.suite.streams import Prompt, Stream, read_all, read_beside

pytestmark = pytest.mark.timeout(600)

FLOOR = 1.2
"""Eight streams make this many times the tokens of one at least; measured were more than three times."""
FEWEST_PIECES = 5


def prompts(name: str, count: int, num_tokens: int) -> list[Prompt]:
    text = "Tell a story of {0} dormice that live in house number {1}."
    return [Prompt(f"{name}-{i}", text.format(i + 2, 7 * i), num_tokens) for i in range(count)]


def rate(streams: list[Stream]) -> float:
    """Tokens a second of all streams together, from asking to the last one: a pause of this client, which
    then reads many at once, can only lower it."""
    start = min(stream.asked_at for stream in streams)
    end = max(stream.times[-1] for stream in streams)
    return sum(len(stream.times) for stream in streams) / (end - start)


def test_eight_streams_make_more_tokens_than_one(
    server: Server, scale: Scale, figures: dict[str, Any]
) -> None:
    """S29: throughput by the number of streams; the batches take turns, so that noise hits them alike."""
    batches = [1, 8] if scale.name == "small" else [1, 2, 4, 8, 16]
    rates: dict[int, list[float]] = {batch: [] for batch in batches}
    for repeat in range(scale(3, 5)):
        for batch in batches:
            asked = prompts(f"rate-{repeat}-{batch}", batch, scale(48, 128))
            rates[batch].append(rate(asyncio.run(read_all(server.url, asked))))
    figures |= {"tokens_per_s": {str(batch): round(statistics.median(r), 1) for batch, r in rates.items()}}
    assert max(rates[8]) > FLOOR * max(rates[1])


def test_a_batch_says_what_each_would_say_alone(
    server: Server, scale: Scale, figures: dict[str, Any]
) -> None:
    """S29: word for word. What was said alone is deleted, so that the batch computes all of it again."""
    asked = prompts("alone", scale(6, 16), scale(24, 96))
    alone = [asyncio.run(read_all(server.url, [prompt]))[0].text for prompt in asked]
    with server.client() as http:
        for prompt in asked:
            http.delete(f"/v1/agents/{prompt.agent}").raise_for_status()
    together = asyncio.run(read_all(server.url, asked))
    assert [stream.text for stream in together] == alone
    figures |= {"streams": len(asked), "tokens_of_each": asked[0].num_tokens}


def test_a_newcomer_joins_a_running_batch(server: Server, scale: Scale, figures: dict[str, Any]) -> None:
    """S29: who asks for little while others decode is answered before they end."""
    running = prompts("running", 4, scale(250, 600))
    late = Prompt("late", "Say hello.", 4)
    streams, comer = asyncio.run(read_beside(server.url, running, late))
    assert comer.times[-1] < min(stream.times[-1] for stream in streams)
    figures |= {
        "running": len(streams),
        "first_token_ms": round(1e3 * comer.first_token_s, 1),
        "tokens_of_others_meanwhile": sum(
            stream.pieces_between(comer.asked_at, comer.times[-1]) for stream in streams
        ),
    }


def test_a_long_prompt_stops_no_stream(server: Server, scale: Scale, figures: dict[str, Any]) -> None:
    """S29: while a long prompt is read, streams go on."""
    running = prompts("beside", 2, scale(300, 800))
    late = Prompt("long", "The harvest of the valley was good. " * scale(150, 500), 1)
    streams, comer = asyncio.run(read_beside(server.url, running, late))
    until = [min(comer.times[0], stream.times[-1]) for stream in streams]
    meanwhile = [
        stream.pieces_between(comer.asked_at, end) for stream, end in zip(streams, until, strict=True)
    ]
    gaps = [b - a for stream in streams for a, b in pairwise(stream.times)]
    figures |= {
        "prompt_words": len(late.text.split()),
        "first_token_of_the_long_prompt_s": round(comer.first_token_s, 2),
        "tokens_of_streams_meanwhile": meanwhile,
        "usual_gap_ms": round(1e3 * statistics.median(gaps), 1),
        "longest_gap_ms": round(1e3 * max(gaps), 1),
    }
    assert min(meanwhile) >= FEWEST_PIECES
