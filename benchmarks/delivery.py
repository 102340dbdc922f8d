"""How long a token travels from the engine to the client: `python -m benchmarks.delivery [--streams 16]`.

The server runs in this process, so that the engine's own moment is known, the clients in another one. For
each event: milliseconds from the engine's emitting it to a client's reading it, and how many arrived before
the next step of the engine had ended. `sink_ms_per_step` is what emitting takes of the engine thread, its
waiting for Python's lock included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from dormouse.api.app import create_app
from dormouse.api.server import Server, bind
from dormouse.api.sink import Sink
from dormouse.domain.requests import Event, TextDelta
from dormouse.engine.loop import EngineLoop
from dormouse.models.host import ModelHost
from dormouse.models.stack import Stack
from dormouse.settings import Settings

NEW_TOKENS = 64


async def read_stream(client: httpx.AsyncClient, index: int) -> list[float]:
    """When each chunk with text arrived, on the system's monotonic clock."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": f"Write a story of {index + 3} dormice."}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0.8,
        "seed": index,
        "stream": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        return [time.monotonic() async for line in response.aiter_lines() if '"delta":{"content":' in line]


async def read_streams(url: str, count: int) -> list[list[float]]:
    """All streams at once."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(read_stream(client, index) for index in range(count)))


def measure(stack: Stack, streams: int) -> dict[str, Any]:
    """One row: delays in milliseconds."""
    emitted: dict[int, list[float]] = {}
    costs: list[float] = []
    step_ends: list[float] = []
    emit, step = Sink.__call__, EngineLoop.step

    def timed_emit(sink: Sink, event: Event) -> None:
        begin = time.monotonic()
        emit(sink, event)
        costs.append(time.monotonic() - begin)
        if isinstance(event, TextDelta):
            emitted.setdefault(id(sink), []).append(begin)

    def timed_step(loop: EngineLoop) -> bool:
        done = step(loop)
        step_ends.append(time.monotonic())
        return done

    with mock.patch.object(Sink, "__call__", timed_emit), mock.patch.object(EngineLoop, "step", timed_step):
        arrived = _serve_and_read(stack, streams)
    # The child cannot know whose sink is whose; streams of one length end in the order of their beginning.
    pairs = zip(
        sorted(emitted.values(), key=lambda m: (len(m), m[0])),
        sorted(arrived, key=lambda m: (len(m), m[0])),
        strict=True,
    )
    delays, in_time = [], 0
    for sent, received in pairs:
        for begin, end in zip(sent, received, strict=True):
            delays.append(1e3 * (end - begin))
            position = bisect_right(step_ends, begin) + 1
            in_time += position >= len(step_ends) or end <= step_ends[position]
    delays.sort()
    return {
        "streams": streams,
        "events": len(delays),
        "step_ms": round(1e3 * statistics.median(b - a for a, b in pairwise(step_ends)), 2),
        "delay_ms": {p: round(delays[int(len(delays) * p / 100)], 2) for p in (50, 90, 99)},
        "before_the_next_step_ended_percent": round(100 * in_time / len(delays), 1),
        "sink_ms_per_step": round(1e3 * sum(costs) / len(step_ends), 2),
    }


def _serve_and_read(stack: Stack, streams: int) -> list[list[float]]:
    ready: list[str] = []
    up = threading.Event()

    def on_ready(url: str) -> None:
        ready.append(url)
        up.set()

    app = create_app(ModelHost(stack.served), stack.store, max_body_nbytes=1 << 20)
    server = Server(app, stack.served.engine, grace_s=5, on_ready=on_ready)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        up.wait(60)
        command = [sys.executable, "-m", "benchmarks.delivery", "--read", ready[0], "--streams", str(streams)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        arrived: list[list[float]] = json.loads(done.stdout)
        return arrived
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        sys.stdout.write(json.dumps(asyncio.run(read_streams(args.read, args.streams))))
        return
    with tempfile.TemporaryDirectory(prefix="dormouse-bench-") as folder:
        settings = Settings(data_dir=Path(folder), arena_tokens=16384)
        with Stack.open(settings) as stack:
            sys.stdout.write(json.dumps(measure(stack, args.streams)) + "\n")


if __name__ == "__main__":
    main()
