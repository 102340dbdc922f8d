"""One server of the comparison as a process group: started, waited for, paused, measured, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.compare.peers import KVBudget, Peer
from benchmarks.compare.traffic import Ask, Client, RequestFailed

START_LIMIT_S = 600.0
END_LIMIT_S = 60.0
SETTLE_LIMIT_S = 180.0
_POLL_S = 0.02


class StartFailed(Exception):
    """A server that is not installed or did not become ready; the message is for its rows."""


@dataclass
class Server:
    """A peer's server: a folder, and a process while it is up. `absence` says why there is none."""

    peer: Peer
    folder: Path
    budget: KVBudget
    absence: str | None = None
    ready_s: float = 0.0
    url: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _workers: list[psutil.Process] = field(default_factory=list, repr=False)
    _client: Client | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The peer's name in rows."""
        return self.peer.name

    @property
    def client(self) -> Client:
        """A client of the running server."""
        assert self._client is not None, f"{self.name} is not running"
        return self._client

    @property
    def log(self) -> Path:
        """What it printed, over all of its starts."""
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start and wait until it answers; sets `ready_s`, or `absence` when it does not come up."""
        try:
            self._start()
        except (StartFailed, OSError) as error:
            self.absence = str(error)
            self.stop()

    def _start(self) -> None:
        if self.peer.version is None:
            raise StartFailed("not installed; see `make peers`")
        self.folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        launch = self.peer.launch(port, self.folder, self.budget)
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                launch.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=os.environ | launch.environment,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}"
        self._wait_until_ready(self.url, started + START_LIMIT_S)
        self.ready_s = time.monotonic() - started
        self._workers = self.family()
        self._client = Client(self.url, self.peer.model, self.peer.fields)

    def _wait_until_ready(self, url: str, deadline: float) -> None:
        process = self._process
        assert process is not None
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartFailed(f"ended with {process.returncode} while starting: {self._last_line()}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(_POLL_S)
        raise StartFailed(f"not ready within {START_LIMIT_S:g} s")

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "it said nothing")

    def settle(self) -> None:
        """After a request that was given up: wait until the server answers others again.

        A server that does not is ended, and `absence` says so.
        """
        try:
            self.client.complete(Ask("Hello", 1, SETTLE_LIMIT_S))
        except RequestFailed as error:
            self.absence = f"answered nothing after a request that was given up ({error})"
            self.stop()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Its turn on the processor: the group runs inside, and is stopped outside."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def pause(self) -> None:
        """Stop the process group without ending it: a server that waits for its turn costs no time."""
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Send to the whole group, if it is up."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it in order, and by force when it takes too long; afterwards none of its processes is left."""
        if self._client is not None:
            self._client.close()
        process, self._client = self._process, None
        if process is None:
            return
        # Workers outlive a leader that crashed; psutil knows them from others that got their numbers since.
        family = list({*self._workers, *self.family()})
        self.signal(signal.SIGCONT)
        process.terminate()
        _, left = psutil.wait_procs(family, END_LIMIT_S)
        for survivor in left:
            survivor.kill()
        process.wait(END_LIMIT_S)
        self._process, self._workers = None, []

    def family(self) -> list[psutil.Process]:
        """The processes of the server: the one that was started and all below it; none once it ended."""
        if self._process is None or self._process.poll() is not None:
            return []
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
