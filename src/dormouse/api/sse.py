"""Server-sent events, as the clients of both dialects read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"


def event(name: str, payload: dict[str, Any]) -> str:
    """One named event: Anthropic's clients drop frames without a name."""
    return f"event: {name}\n{data(payload)}"


def data(payload: dict[str, Any]) -> str:
    """One event. The JSON holds no raw newline, so it is always one line."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def stream(frames: AsyncIterator[str]) -> StreamingResponse:
    """A response that proxies pass on at once."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(frames, media_type="text/event-stream", headers=headers)
