"""The bound on request bodies, kept before anything parses them."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: answers 413 to a body over `max_nbytes`, as soon as that much was read."""

    def __init__(self, app: ASGIApp, max_nbytes: int) -> None:
        self._app = app
        self._max_nbytes = max_nbytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; what it reads of the body is counted."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_nbytes:
                # FastAPI lets this pass where it would turn any other error into a 400.
                raise HTTPException(413, f"the body is over {self._max_nbytes} bytes; send less")
            return message

        await self._app(scope, counted, send)
