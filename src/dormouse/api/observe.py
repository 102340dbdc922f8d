"""The outermost middleware: every request gets an id, and is reported when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dormouse.api import request_id
from dormouse.api.call import Call
from dormouse.api.errors import speaks_anthropic
from dormouse.api.rate_limits import RateLimits

Observer = Callable[[Call], None]


class Observe:
    """ASGI middleware: puts `request_id` and `call` into the request's state, the id onto its answer, and
    shows the ended call to each observer."""

    def __init__(self, app: ASGIApp, limits: RateLimits, observers: Sequence[Observer]) -> None:
        self._app = app
        self._limits = limits
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = Call(
            request_id.choose_request_id(headers.get(request_id.HEADER)),
            scope["method"],
            scope["path"],
            self._limits,
            traceparent=headers.get("traceparent"),
        )
        scope.setdefault("state", {}).update(request_id=call.id, call=call)
        # Each request is a task of its own, so nothing has to be put back.
        request_id.set_current(call.id)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                answer = MutableHeaders(scope=message)
                answer[request_id.HEADER] = call.id
                if speaks_anthropic(call.path):
                    answer[request_id.ANTHROPIC_HEADER] = call.id
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            call.ended_at = time.monotonic()
            call.route = getattr(scope.get("route"), "path", call.route)
            if call.caller is not None:
                self._limits.spend_tokens(call.caller, sum(reply.num_tokens for reply in call.replies))
            for observer in self._observers:
                observer(call)
