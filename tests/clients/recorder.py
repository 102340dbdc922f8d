"""A proxy that passes everything on as it is and keeps what went by."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

_HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_METHODS = ["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"]
_START_TIMEOUT_S = 30.0


@dataclass
class Exchange:
    """A request and the answer to it. `is_complete` when the server ended the answer and the client took
    all of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    answer: bytearray = field(default_factory=bytearray)
    is_complete: bool = False

    @property
    def sent(self) -> dict[str, Any]:
        """The request's JSON."""
        return dict(json.loads(self.body))

    def events(self) -> list[dict[str, Any]]:
        """The JSON of the answer's events, in order."""
        lines = self.answer.decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def event(self, kind: str) -> dict[str, Any]:
        """The only event of a type."""
        (found,) = [event for event in self.events() if event["type"] == kind]
        return found


class Recorder:
    """What went by, oldest first. `url` is where clients are sent."""

    def __init__(self, target: str) -> None:
        self.exchanges: list[Exchange] = []
        self.url = ""
        self._target = target

    def posts(self, path: str) -> list[Exchange]:
        """The POST requests of a path, so far."""
        return [one for one in self.exchanges.copy() if (one.method, one.path) == ("POST", path)]

    def forget(self) -> None:
        """Begin anew."""
        self.exchanges.clear()

    def app(self) -> Starlette:
        """The proxy."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with httpx.AsyncClient(base_url=self._target, timeout=None) as self._client:
                yield

        return Starlette(routes=[Route("/{path:path}", self._pass_on, methods=_METHODS)], lifespan=lifespan)

    async def _pass_on(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in _HOP_BY_HOP}
        exchange = Exchange(request.method, request.url.path, headers, await request.body())
        self.exchanges.append(exchange)
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        passed = self._client.build_request(request.method, url, headers=headers, content=exchange.body)
        reply = await self._client.send(passed, stream=True)
        exchange.status = reply.status_code
        kept = {name: value for name, value in reply.headers.items() if name not in _HOP_BY_HOP}
        return StreamingResponse(_through(reply, exchange), reply.status_code, kept)


async def _through(reply: httpx.Response, exchange: Exchange) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(reply):
        async for piece in reply.aiter_raw():
            exchange.answer += piece
            yield piece
    exchange.is_complete = True


@contextlib.contextmanager
def recording(target: str) -> Iterator[Recorder]:
    """A recorder in front of `target`, on a free port."""
    recorder = Recorder(target)
    config = uvicorn.Config(recorder.app(), port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="recorder")
    thread.start()
    try:
        recorder.url = f"http://127.0.0.1:{_port(server, thread)}"
        yield recorder
    finally:
        server.should_exit = True
        thread.join(_START_TIMEOUT_S)


def _port(server: uvicorn.Server, thread: threading.Thread) -> int:
    deadline = _START_TIMEOUT_S
    while not server.started:
        thread.join(0.02)
        deadline -= 0.02
        if not thread.is_alive() or deadline < 0:
            raise RuntimeError("the recorder did not start")
    return int(server.servers[0].sockets[0].getsockname()[1])
