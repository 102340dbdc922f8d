"""Streams, and what happens to what they stream from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from dormouse.api import sse


def test_an_event_is_one_line_to_every_client() -> None:
    every = "".join(map(chr, range(0x3000)))
    frame = sse.data({"text": every})
    assert len(frame.splitlines()) == 2
    assert json.loads(frame.removeprefix("data: "))["text"] == every
    assert "é" in sse.data({"text": "é"}), "no more is escaped than must be"


class Source:
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.num_closed = 0

    async def aclose(self) -> None:
        self.num_closed += 1


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_whoever_goes_away_leaves_nothing_open(num_read: int) -> None:
    """Gone before the first frame, after it, and not at all."""
    source, sent, gone = Source(), [], asyncio.Event()

    async def frames() -> AsyncGenerator[str, None]:
        for _ in range(3):
            yield sse.PING

    async def receive() -> Message:
        if num_read:
            await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        bodies = [one for one in sent if one.get("body")]
        if num_read < 3 and len(bodies) == num_read:
            gone.set()
            await asyncio.Event().wait()  # a connection that takes no more

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(sse.stream(frames(), source)(scope, receive, send))
    assert source.num_closed == 1
    assert len([one for one in sent if one.get("body")]) == num_read
