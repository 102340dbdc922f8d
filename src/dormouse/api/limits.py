"""The bounds on request bodies, in bytes and in time, kept before anything parses them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dormouse.api.errors import TOO_LARGE, TOO_SLOW, request_id_of, response
from dormouse.domain.errors import RequestTooLarge

BODY_S = 30.0
"""A body has so long to come, and a second more for each `LEAST_RATE` bytes of it."""

LEAST_RATE = 16_000


class BodyLimit:
    """ASGI middleware: answers 413, in the envelope, to a body over `max_nbytes`, declared or not, and 408
    to one that trickles.

    `larger` has the bounds of those paths whose bodies are not read into memory; their routes watch the time.

    FastAPI's own limit answers a declared one in plain text.
    """

    def __init__(self, app: ASGIApp, max_nbytes: int, larger: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; what it reads of the body is counted."""
        max_nbytes = self._larger.get(scope.get("path", ""), self._max_nbytes)
        error = RequestTooLarge(f"the body is over {max_nbytes} bytes; send less")
        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > max_nbytes:
            await response(error, scope["path"], request_id_of(scope))(scope, receive, send)
            return
        seen, is_whole = 0, scope.get("path", "") in self._larger
        started = asyncio.get_running_loop().time()

        async def counted() -> Message:
            nonlocal seen, is_whole
            until = None if is_whole else started + BODY_S + seen / LEAST_RATE
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                # What still trickles in is nobody's business any more.
                raise HTTPException(
                    TOO_SLOW,
                    f"only {seen} bytes of the body came in time; send it again",
                    {"connection": "close"},
                ) from None
            seen += len(message.get("body", b""))
            is_whole = is_whole or not message.get("more_body", False)
            if seen > max_nbytes:
                # FastAPI lets this pass where it would turn any other error into a 400.
                raise HTTPException(TOO_LARGE, str(error))
            return message

        await self._app(scope, counted, send)
