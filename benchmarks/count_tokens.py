"""What counting tokens costs those who decode: `python -m benchmarks.count_tokens`. One JSON row.

Four streams decode in this process. In turns of a second nothing else happens, or a body like a coding
assistant's (three system blocks, 24 tools, about 20000 tokens) is rendered and encoded 50 times a second, as
the API does it: on the workers, remembered by pieces. `fresh`: with a first system block that is new each
time, so that nothing is remembered. Machines are noisy, so turns are compared pair by pair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from dormouse.api.services import PROMPT_TIMEOUT_S
from dormouse.bench.client import random_prompt
from dormouse.domain.requests import Event, Request, SamplingParams
from dormouse.engine.loop import EngineLoop
from dormouse.models.chat import ChatModel
from dormouse.models.stack import Stack
from dormouse.models.workers import Workers
from dormouse.settings import Settings

STREAMS = 4
CALLS_PER_S = 50
TENANT = "bench"
WORDS = ("the", "harvest", "of", "a", "valley", "in", "a", "year", "with", "rain", "was", "counted", "late")
TOOLS = json.dumps(
    [
        {
            "name": f"tool_{index}",
            "description": " ".join(WORDS[(index * k) % len(WORDS)] for k in range(560)),
            "input_schema": {
                "type": "object",
                "properties": {f"field_{k}": {"type": "string", "description": WORDS[k]} for k in range(12)},
            },
        }
        for index in range(24)
    ]
)


def body(marker: str) -> list[dict[str, Any]]:
    """Messages of about 20000 tokens; this model's template knows no tools, so they are system text."""
    blocks = [f"You are an assistant. {marker}", " ".join(WORDS * 40), TOOLS]
    return [
        {"role": "system", "content": "\n".join(blocks)},
        {"role": "user", "content": "Read the file and tell me what it does."},
    ]


def count_tokens(chat: ChatModel, messages: list[dict[str, Any]]) -> int:
    """What one call does."""
    return len(chat.encode_prompt(chat.render_text(messages), TENANT))


async def call_steadily(chat: ChatModel, seconds: float, markers: Iterator[str]) -> list[float]:
    """Calls at their rate for so long; how long each took, in seconds, its wait for a thread included."""
    workers = Workers("the prompt", PROMPT_TIMEOUT_S)
    taken: list[float] = []

    async def call(messages: list[dict[str, Any]]) -> None:
        begin = time.monotonic()
        await workers.run(TENANT, count_tokens, chat, messages)
        taken.append(time.monotonic() - begin)

    calls = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        calls.append(asyncio.create_task(call(body(next(markers)))))
        await asyncio.sleep(1 / CALLS_PER_S)
    await asyncio.gather(*calls)
    workers.close()
    return taken


class Steps:
    """When the engine's steps ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def rate_and_longest(self, begin: float, end: float) -> tuple[float, float]:
        """Steps a second, and the longest time from one to the next, in seconds."""
        ends = [moment for moment in self.ends if begin <= moment <= end]
        gaps = [b - a for a, b in pairwise(ends)] or [end - begin]
        return len(ends) / (end - begin), max(gaps)


def measure(stack: Stack, rounds: int, turn_s: float) -> dict[str, Any]:
    """One row."""
    chat = stack.served.chat
    size = count_tokens(chat, body(""))
    markers: dict[str, Iterator[str]] = {"same": iter(lambda: "", None), "fresh": map(str, count())}
    steps = Steps()
    step = EngineLoop.step

    def timed(loop: EngineLoop) -> bool:
        done = step(loop)
        steps.ends.append(time.monotonic())
        return done

    rates: dict[str, list[float]] = {"alone": [], "same": [], "fresh": []}
    longest: dict[str, list[float]] = {"alone": [], "same": [], "fresh": []}
    calls: dict[str, list[float]] = {"same": [], "fresh": []}
    with mock.patch.object(EngineLoop, "step", timed):
        stop = decode(stack)
        for _ in range(rounds):
            for kind in rates:
                begin = time.monotonic()
                if kind == "alone":
                    time.sleep(turn_s)
                else:
                    calls[kind] += asyncio.run(call_steadily(chat, turn_s, markers[kind]))
                rate, gap = steps.rate_and_longest(begin, time.monotonic())
                rates[kind].append(rate)
                longest[kind].append(gap)
        stop()
    return {
        "tokens": size,
        "streams": STREAMS,
        "rounds": rounds,
        "steps_per_s": {kind: round(statistics.median(values), 1) for kind, values in rates.items()},
        "slowdown_percent": {
            kind: round(
                100
                * (
                    1
                    - statistics.median(
                        slower / alone for slower, alone in zip(rates[kind], rates["alone"], strict=True)
                    )
                ),
                1,
            )
            for kind in calls
        },
        "longest_step_ms": {kind: round(1e3 * statistics.median(gaps), 1) for kind, gaps in longest.items()},
        "calls": {kind: len(taken) for kind, taken in calls.items()},
        "call_ms": {
            kind: {"p50": round(1e3 * statistics.median(taken), 2), "max": round(1e3 * max(taken), 2)}
            for kind, taken in calls.items()
        },
    }


def decode(stack: Stack) -> Callable[[], None]:
    """Streams that decode until the returned function is called."""
    engine = stack.served.engine
    begun = threading.Semaphore(0)
    params = SamplingParams(temperature=0, max_tokens=engine.max_length, ignore_eos=True)

    def sink(event: Event) -> None:
        del event
        begun.release()

    names = [f"stream-{index}" for index in range(STREAMS)]
    for index, name in enumerate(names):
        prompt = tuple(random_prompt(index, 100, stack.served.vocab_size))
        engine.submit(Request(name, prompt, replace(params, max_tokens=engine.max_length - 100), sink))
    for _ in range(10 * STREAMS):
        begun.acquire(timeout=60)

    def stop() -> None:
        for name in names:
            engine.abort(name)

    return stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn", type=float, default=1.0, help="Seconds of a turn; a round has three.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        settings = Settings(data_dir=Path(folder), arena_tokens=34_000, speculation="off")
        with Stack.open(settings) as stack:
            sys.stdout.write(json.dumps(measure(stack, args.rounds, args.turn)) + "\n")


if __name__ == "__main__":
    main()
