"""Server-sent events, as the clients of both dialects read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"


def event(name: str, payload: dict[str, Any]) -> str:
    """One named event: Anthropic's clients drop frames without a name."""
    return f"event: {name}\n{data(payload)}"


def events(payloads: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Events named by their own `type`."""
    return (event(payload["type"], payload) for payload in payloads)


_ENDS_OF_LINES = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""JSON leaves them as they are, and the standard of events knows none of them; but clients that split lines
as Python does (httpx) would take what a model wrote behind one for an event of ours."""


def data(payload: dict[str, Any]) -> str:
    """One event, which is one line to every client: JSON escapes newlines, and this what else may be one."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text if text.isascii() else text.translate(_ENDS_OF_LINES)}\n\n"


class Source(Protocol):
    """What frames are made from; closed when nobody reads on."""

    async def aclose(self) -> None:
        """Stop what is not complete."""


def stream(frames: AsyncGenerator[str, None], source: Source) -> StreamingResponse:
    """A response that proxies pass on at once. It closes `frames` and `source`, however it ends."""
    return _Stream(frames, source)


class _Stream(StreamingResponse):
    def __init__(self, frames: AsyncGenerator[str, None], source: Source) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._frames = frames
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not for the generator to do: that of a client that is gone already is never started.
        async with contextlib.aclosing(self._source), contextlib.aclosing(self._frames):
            await super().__call__(scope, receive, send)
