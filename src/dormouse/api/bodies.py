"""Request bodies as JSON and nothing else.

Python's own reader also takes NaN, halves of characters, and any nesting that its stack bears. Each of these
is found out much later, where it is written into an answer, a file or a prompt, so all are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

_BAD_REQUEST, _UNSUPPORTED_MEDIA = 400, 415
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients on Windows begin with it."""


class _JsonRequest(Request):
    """A request whose body is strict JSON: UTF-8, finite numbers, whole characters, 200 levels at most."""

    async def json(self) -> Any:
        """The body. FastAPI passes on HTTPException alone."""
        coding = self.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            # What is unpacked has no bound of its own.
            raise HTTPException(_UNSUPPORTED_MEDIA, "compressed bodies are not read; send it as it is")
        return read_json(await self.body())


class JsonRoute(APIRoute):
    """A route with a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's way to exchange the request."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def read_json(body: bytes) -> Any:
    """The value that `body` is. Raises HTTPException with 400."""
    try:
        value = from_json(body.removeprefix(_BYTE_ORDER_MARK), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise HTTPException(_BAD_REQUEST, f"the body is not valid JSON: {error}") from error
    if not _is_finite(value):
        raise HTTPException(_BAD_REQUEST, "the body has a number that is too large; send a smaller one")
    return value


def _is_finite(value: Any) -> bool:
    """Whether all numbers are: 1e999 is JSON, and infinity is what it is read as."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, float) and not math.isfinite(node):
            return False
    return True
