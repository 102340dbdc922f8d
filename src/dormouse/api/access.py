"""Who may come in: keys, the admin scope, and how often."""

from __future__ import annotations

import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dormouse.api import errors
from dormouse.api.call import Call
from dormouse.api.caller import Caller
from dormouse.api.keys import KeyRing
from dormouse.api.rate_limits import RateLimits
from dormouse.domain.errors import CannotListen, DormouseError, Forbidden, Unauthorized

_PUBLIC = frozenset({"/", "/api/hello", "/health"})
_PUBLIC_PREFIX = "/health/"
"""What probes ask, and what clients ask before they have shown a key. Says nothing about anybody."""

_ADMIN = frozenset({"/metrics", "/admin"})
_ADMIN_PREFIX = "/admin/"


class Access:
    """ASGI middleware: puts the `caller` into the request's state, or answers 401, 403 or 429."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, limits: RateLimits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if it may come in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, state = scope["path"], scope["state"]
        call: Call = state["call"]
        call.caller = self._caller(Headers(scope=scope))
        try:
            state["caller"] = self._admit(path, call.caller, Headers(scope=scope))
        except DormouseError as error:
            answer = errors.response(error, path, state["request_id"])
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, path: str, caller: Caller | None, headers: Headers) -> Caller:
        if path in _PUBLIC or path.startswith(_PUBLIC_PREFIX):
            return caller or Caller(is_admin=False)
        if caller is None:
            raise Unauthorized(
                "this API key is not valid; ask for one, or see `dormouse keys add`"
                if _presented(headers)
                else "no API key; send one as x-api-key or as Authorization: Bearer"
            )
        if not caller.is_admin and (path in _ADMIN or path.startswith(_ADMIN_PREFIX)):
            raise Forbidden("this needs an admin key; see `dormouse keys add --admin`")
        self._limits.admit_request(caller)
        return caller

    def _caller(self, headers: Headers) -> Caller | None:
        """Whose key it is; None when keys are in use and none that came is valid."""
        if self._keys is None or self._keys.is_open:
            return Caller()
        for presented in _presented(headers):
            key = self._keys.find(presented)
            if key is not None:
                return Caller(key.tenant, key.id, key.is_admin)
        return None


def _presented(headers: Headers) -> list[str]:
    """What came as a key. Clients may send both headers, one of them with a placeholder."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (headers.get("x-api-key", ""), bearer) if key]


def check_exposure(listener: socket.socket, keys: KeyRing, *, insecure: bool) -> None:
    """Refuse to serve other machines without a key. Raises CannotListen."""
    address = listener.getsockname()[0].partition("%")[0]
    if insecure or not keys.is_open or ipaddress.ip_address(address).is_loopback:
        return
    raise CannotListen(
        f"{address} can be reached from other machines and there is no API key: make one with "
        "`dormouse keys add --tenant NAME`, serve on --host 127.0.0.1, or give --insecure to serve everybody"
    )
