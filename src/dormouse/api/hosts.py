"""By which names a server without keys may be called, and by which web pages.

A browser keeps pages of other origins from reading answers, but it sends their simple requests all the same,
and a page whose name is made to point at 127.0.0.1 (DNS rebinding) is of the server's own origin. Keys
protect from both. Without keys the `Host` header does, as the page cannot choose it: it is the name by which
the browser went, and an address is nobody's name. So does the `Origin` header, which a page cannot leave out.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dormouse.api import errors
from dormouse.api.keys import KeyRing
from dormouse.domain.errors import AddressRefused

ANY = "*"
_WEB = ("http", "https")


class HostCheck:
    """ASGI middleware: while there are no keys, answers 403 to what comes by a foreign name, or from a web
    page that is neither the server's own nor one of `cors_origins`."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        allowed_hosts: Collection[str] = (),
        cors_origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._names = {name.lower() for name in (*allowed_hosts, "localhost", socket.gethostname())}
        self._origins = {origin.lower() for origin in cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if it may come in."""
        if scope["type"] == "http" and (self._keys is None or self._keys.is_open):
            try:
                self._check(Headers(scope=scope))
            except AddressRefused as error:
                answer = errors.response(error, scope["path"], errors.request_id_of(scope))
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        for host in hosts:
            if not self._is_ours(_name(host)):
                raise AddressRefused(
                    f"this server has no API keys and is not called {_name(host)!r}; call it by its address, "
                    f"start it with --allowed-hosts {_name(host)}, or make a key with `dormouse keys add`"
                )
        origin = headers.get("origin")
        if origin is not None and not self._may_call(origin.lower(), hosts):
            raise AddressRefused(
                f"pages of {origin} may not call this server, which has no API keys; start it with "
                f"--cors-origins {origin} to let them"
            )

    def _is_ours(self, name: str) -> bool:
        return ANY in self._names or name in self._names or name.endswith(".localhost") or _is_address(name)

    def _may_call(self, origin: str, hosts: Collection[str]) -> bool:
        if ANY in self._origins or origin in self._origins:
            return True
        scheme, _, authority = origin.partition("://")
        # Programs made of web pages (editors, note books) have schemes of their own, and are installed.
        is_page = scheme in _WEB or not authority
        return not is_page or any(authority == host.lower() for host in hosts)


def _name(host: str) -> str:
    """A `Host` header without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
