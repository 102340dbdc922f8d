"""The server through its lives: started, stopped in order, killed, started again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.server import Server, serve
from benchmarks.soak.mix import What

_UP_TIMEOUT_S = 400.0


@dataclass
class Life:
    """One process. Times are seconds into the run; `end` is how it ended, with its exit code."""

    began: float
    ready_s: float
    pid: int
    ended: float | None = None
    end: str = ""
    exit_code: int | None = None


@dataclass
class Host:
    """Owns the server process. Its clock is the run's: it starts when the first server is ready."""

    data_dir: Path
    flags: list[str]
    log: Path
    lives: list[Life] = field(default_factory=list)
    url: str = ""
    _windows: list[list[float]] = field(default_factory=list)
    _origin: float = field(default_factory=time.monotonic)
    _up: asyncio.Event = field(default_factory=asyncio.Event)
    _server: Server | None = None
    _restarting: asyncio.Task[None] | None = None
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def now(self) -> float:
        """Seconds into the run."""
        return time.monotonic() - self._origin

    @property
    def pid(self) -> int | None:
        """Of the process that serves; None while none does."""
        return self._server.pid if self._server is not None and self._up.is_set() else None

    async def start(self) -> None:
        """A process that answers. Raises RuntimeError when it does not get there."""
        opening = serve(self.data_dir, *self.flags, log=self.log)
        self._server = await asyncio.to_thread(self._held.enter_context, opening)
        self.url = self._server.url
        if not self.lives:
            self._origin = time.monotonic()
        self.lives.append(Life(self.now, self._server.ready_s, self._server.pid))
        self._up.set()

    async def end(self, how: What) -> None:
        """End the process; for SIGTERM in order, as it does it itself."""
        server = self._server
        if server is None or not self._up.is_set():
            return
        self._windows.append([self.now, float("inf")])
        self._up.clear()
        await asyncio.to_thread(server.kill if how is What.SIGKILL else server.stop)
        life = self.lives[-1]
        life.ended, life.end, life.exit_code = self.now, how.value, server.process.returncode
        await asyncio.to_thread(self._held.close)

    async def restart(self, how: What) -> None:
        """End it, and start another on the same data. Goes on to its end when who asked is cancelled."""
        self._restarting = asyncio.create_task(self._restart(how))
        await asyncio.shield(self._restarting)

    async def _restart(self, how: What) -> None:
        await self.end(how)
        await self.start()
        self._windows[-1][1] = self.now

    async def until_up(self) -> None:
        """Return when a server answers. Raises TimeoutError."""
        async with asyncio.timeout(_UP_TIMEOUT_S):
            await self._up.wait()

    def was_down(self, since: float) -> bool:
        """Whether the server was being ended or started at any time since then."""
        return any(end >= since for _, end in self._windows)

    def close(self) -> None:
        """End the process however it is."""
        self._up.clear()
        self._held.close()

    def as_json(self) -> list[dict[str, Any]]:
        """All lives."""
        rows = [dict(vars(life)) for life in self.lives]
        return [{key: row[key] for key in row if key != "pid"} for row in rows]
