"""The HTTP server process: ready, serving, and ending in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from dormouse.api.accept_errors import AcceptErrors
from dormouse.api.connection import Connection
from dormouse.domain.errors import CannotListen, ShuttingDown

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the longest Retry-After: who comes back just as its idle connection closes gets an error."""

_SAME_WISH_S = 0.5
"""Signals that arrive together are one: a terminal or a supervisor may signal the whole process group."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not listening yet.

    Raises CannotListen.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(
            f"{host} is no address of this machine ({error}); choose another --host"
        ) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise CannotListen(
            f"cannot serve on {host}:{port} ({error.strerror}); stop what uses it or choose another --port"
        ) from error
    return bound


class BodyCut(Exception):
    """A body that cannot be finished, raised when the log has said why: the connection is closed."""


class Stoppable(Protocol):
    """What ends all requests: a host, or an engine."""

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones end within `grace_s`, then cut them; see `Engine.stop`."""


class Server(uvicorn.Server):
    """uvicorn, with a start and an end that suit models and streams.

    It answers from the first moment, health above all, while `load` brings the model. The first SIGTERM or
    SIGINT refuses new requests and lets running ones finish within the grace period; a second one cuts them.
    Either way what they computed is saved and the process exits with 0.
    """

    def __init__(
        self,
        app: FastAPI,
        requests: Stoppable,
        *,
        grace_s: float,
        on_ready: Callable[[str], None],
        load: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        # Requests end by the engine's grace; uvicorn's own bound is only for connections that hang.
        config = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(grace_s) + 10,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._requests = requests
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._load = load
        self._signalled_at: float | None = None

    async def main_loop(self) -> None:
        """Load, tell the caller at which URL, and serve until a signal. Raises what loading raises."""
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        if self._load is not None:
            try:
                await self._load()
            except ShuttingDown:
                return  # a signal came before the model
            except BaseException:
                await self.shutdown()
                raise
        if self.should_exit:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the requests first: that ends every stream, and so the connections."""
        # On a thread of its own: the shared ones may all be waiting for a disk.
        with ThreadPoolExecutor(1, "shutdown") as thread:
            stop = partial(self._requests.stop, self._grace_s)
            await asyncio.get_running_loop().run_in_executor(thread, stop)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signals end the server here and are not raised again: an asked-for end is no failure."""
        del frame
        now = time.monotonic()
        if self._signalled_at is not None and now < self._signalled_at + _SAME_WISH_S:
            return
        self._signalled_at = now
        if self.should_exit:
            log.warning("%s again: cutting what still runs", signal.Signals(sig).name)
            threading.Thread(target=self._requests.stop, args=(0.0,), daemon=True).start()
        else:
            log.info("%s: ending within %g s", signal.Signals(sig).name, self._grace_s)
            self.should_exit = True


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn says what was not said yet: only by raising can an application close a connection."""
    return record.exc_info is None or not isinstance(record.exc_info[1], BodyCut)
