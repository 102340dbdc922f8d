"""A client's connection, with a bound on each wait for the client."""

from __future__ import annotations

import asyncio
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """uvicorn's, which waits for the end of a request's headers, and for a client that does not read, for as
    long as the client likes. Here either is cut; what was generated for it is saved, as after any disconnect.
    """

    headers_s = 30.0
    """From the first byte, or the opening of the connection, to the last byte of the headers."""

    stall_s = 60.0
    """So long may the send buffer stay full. What is generated meanwhile waits in memory: a reply at most."""

    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()
        else:
            self._disarm(headers=True)

    def pause_writing(self) -> None:
        """The send buffer is full."""
        super().pause_writing()
        self._reading_due = self.loop.call_later(self.stall_s, self._cut, "read nothing", self.stall_s)

    def resume_writing(self) -> None:
        """The send buffer has room again."""
        super().resume_writing()
        self._disarm(reading=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, whoever ended it."""
        super().connection_lost(exc)
        self._disarm(headers=True, reading=True)

    def _await_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(
                self.headers_s, self._cut, "sent no whole request", self.headers_s
            )

    def _cut(self, what: str, seconds: float) -> None:
        log.info("a connection was cut: its client %s for %g s", what, seconds)
        self.transport.abort()

    def _disarm(self, *, headers: bool = False, reading: bool = False) -> None:
        if headers and self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
        if reading and self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
