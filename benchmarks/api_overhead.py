"""What the API takes of a step: `python -m benchmarks.api_overhead [--streams 16]`. One JSON row.

One engine decodes the same prompts bare, with sinks that drop what they are given, and over HTTP, streamed in
each dialect to clients in another process. `overhead_percent` is how much longer a step of the median round
takes over HTTP, `us_per_token` the same for one token of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from dormouse.api.app import create_app
from dormouse.api.server import Server, bind
from dormouse.bench.machine import describe
from dormouse.domain.requests import Event, Failed, Finished, Request, SamplingParams
from dormouse.engine.loop import EngineLoop
from dormouse.models.stack import Stack
from dormouse.settings import Settings

NEW_TOKENS = 64
FEWEST_STEPS = 16
"""With all streams decoding; the replies of some dialects may end before their bound."""
PROMPT = "Write a story of {} dormice."
DIALECTS = {
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/responses": "input",
    "/v1/completions": "prompt",
}


def main() -> int:
    """Print the row, or read streams for the process that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--read", nargs=2, metavar=("URL", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        url, path = args.read
        asyncio.run(read_streams(url, path, args.streams))
        return 0
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        settings = Settings(data_dir=Path(folder), arena_tokens=16384, speculation="off")
        with Stack.open(settings) as stack:
            row = measure(stack, args.streams, args.repeat)
    sys.stdout.write(json.dumps({"benchmark": "api_overhead", **row, "machine": describe()}, indent=2) + "\n")
    return 0


def measure(stack: Stack, streams: int, repeat: int) -> dict[str, Any]:
    """Medians over `repeat` rounds, in each of which every way takes its turn."""
    ways = ["bare", *DIALECTS]
    rounds: dict[str, list[float]] = {way: [] for way in ways}
    with _serving(stack) as url:
        for way in ways:  # once to warm up: every way finds the same prompts in memory then
            _run(stack, url, way, streams)
        for _ in range(repeat):
            for way in ways:
                rounds[way].append(_run(stack, url, way, streams))
    ms = {way: statistics.median(values) for way, values in rounds.items()}
    return {
        "streams": streams,
        "tokens": NEW_TOKENS,
        "bare_step_ms": round(ms["bare"], 2),
        "dialects": {
            path: {
                "step_ms": round(ms[path], 2),
                "overhead_percent": round(100 * (ms[path] / ms["bare"] - 1), 1),
                "us_per_token": round(1e3 * (ms[path] - ms["bare"]) / streams, 1),
            }
            for path in DIALECTS
        },
        "rounds_ms": {way: [round(value, 2) for value in values] for way, values in rounds.items()},
    }


def _run(stack: Stack, url: str, way: str, streams: int) -> float:
    """The median step in ms while all `streams` decode."""
    engine = stack.served.engine
    ends: list[tuple[float, int]] = []
    step = EngineLoop.step

    def timed(loop: EngineLoop) -> bool:
        done = step(loop)
        ends.append((time.monotonic(), engine.stats().num_running))
        return done

    with mock.patch.object(EngineLoop, "step", timed):
        if way == "bare":
            _decode(stack, streams)
        else:
            command = [sys.executable, "-m", "benchmarks.api_overhead", "--streams", str(streams)]
            subprocess.run([*command, "--read", url, way], check=True, timeout=300)
    full = [1e3 * (b - a) for (a, before), (b, after) in pairwise(ends) if before == after == streams]
    if len(full) < FEWEST_STEPS:
        raise RuntimeError(f"{way}: {streams} streams decoded together for {len(full)} steps only; use fewer")
    return statistics.median(full)


def _decode(stack: Stack, streams: int) -> None:
    """All streams without an API: the end of each is awaited, all else is dropped."""
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()
    chat, engine = stack.served.chat, stack.served.engine

    def sink(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ended.put(event)

    for index in range(streams):
        sampling = SamplingParams(temperature=0.8, seed=index, max_tokens=NEW_TOKENS, ignore_eos=True)
        prompt = tuple(chat.encode(PROMPT.format(index + 3)))
        engine.submit(Request(f"bare-{index}", prompt, sampling, sink, deadline_s=300))
    for _ in range(streams):
        if isinstance(end := ended.get(timeout=300), Failed):
            raise end.error


async def read_streams(url: str, path: str, count: int) -> None:
    """All streams at once, each read to its end as bytes: what a client makes of them is not the API's."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def read(index: int) -> None:
            async with client.stream("POST", path, json=_body(path, index)) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_raw():
                    pass

        await asyncio.gather(*(read(index) for index in range(count)))


def _body(path: str, index: int) -> dict[str, Any]:
    text, kind = PROMPT.format(index + 3), DIALECTS[path]
    given: Any = [{"role": "user", "content": text}] if kind == "messages" else text
    limit = "max_output_tokens" if kind == "input" else "max_tokens"
    return {
        "model": "smollm2",
        kind: given,
        limit: NEW_TOKENS,
        "temperature": 0.8,
        "stream": True,
        "ignore_eos": True,  # where the dialect knows it
        **({"store": False} if kind == "input" else {}),
    }


@contextmanager
def _serving(stack: Stack) -> Iterator[str]:
    ready: queue.SimpleQueue[str] = queue.SimpleQueue()
    app = create_app(stack.host, stack.store, max_body_nbytes=1 << 20)
    listener = bind("127.0.0.1", 0)
    server = Server(app, stack.served.engine, grace_s=5, on_ready=ready.put)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield ready.get(timeout=60)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


if __name__ == "__main__":
    sys.exit(main())
