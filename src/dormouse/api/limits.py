"""The bound on request bodies, kept before anything parses them."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dormouse.api.errors import TOO_LARGE, request_id_of, response
from dormouse.domain.errors import RequestTooLarge


class BodyLimit:
    """ASGI middleware: answers 413, in the envelope, to a body over `max_nbytes`, declared or not.

    `larger` has the bounds of those paths whose bodies are not read into memory.

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
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > max_nbytes:
                # FastAPI lets this pass where it would turn any other error into a 400.
                raise HTTPException(TOO_LARGE, str(error))
            return message

        await self._app(scope, counted, send)
