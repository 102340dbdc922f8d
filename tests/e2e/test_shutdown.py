"""The end of a real server: streams end in order, nothing is left open, the exit code is 0.

Python runs in its development mode with warnings as errors: what is not closed says so.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.server import Server, serve

pytestmark = [pytest.mark.usefixtures("smollm2", "strict"), pytest.mark.timeout(300)]

ARENA = ("--arena-tokens", "8192")
WAIT_S = 60.0
_APART_S = 0.6
"""Signals closer than half a second are one wish."""


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment of a server's process holds."""
    monkeypatch.setenv("PYTHONDEVMODE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """What the servers print, which must hold no complaint."""
    log = tmp_path / "log"
    yield log
    text = log.read_text()
    for complaint in ("Warning", "Traceback", "ERROR", "never retrieved", "was destroyed"):
        assert complaint not in text, text


class Stream:
    """A streamed reply, read by a thread of its own."""

    def __init__(self, server: Server, *, max_tokens: int, agent: str = "ada") -> None:
        self.has_begun = threading.Event()
        self.events: list[str] = []
        self._server = server
        self._body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Count to one thousand."}],
            "max_tokens": max_tokens,
            "min_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        self._headers = {"x-agent-id": agent}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.has_begun.wait(WAIT_S)

    def result(self) -> list[str]:
        """All events, once the connection was closed in order."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.events

    def _read(self) -> None:
        with (
            self._server.client() as client,
            client.stream("POST", "/v1/chat/completions", json=self._body, headers=self._headers) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                if len(self.events) == 3:
                    self.has_begun.set()


@contextmanager
def serving(folder: Path, log: Path, *flags: str) -> Iterator[Server]:
    with serve(folder / "data", *ARENA, *flags, log=log) as server:
        yield server


def test_a_running_reply_ends_within_the_grace(tmp_path: Path, log: Path) -> None:
    with serving(tmp_path, log, "--grace-s", "60") as server:
        stream = Stream(server, max_tokens=300)
        server.process.send_signal(signal.SIGTERM)
        with server.client() as client:
            refused: Any = None
            while refused is None or refused.status_code == 200:
                refused = client.get("/health")
            assert refused.json()["status"] == "draining"
            answer = client.post(
                "/v1/chat/completions",
                json={"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]},
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            assert answer.headers["retry-after"]
        events = stream.result()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(WAIT_S) == 0
    assert "everything is saved" in log.read_text()


def test_a_second_signal_cuts_and_saves(tmp_path: Path, log: Path) -> None:
    with serving(tmp_path, log, "--grace-s", "3600") as server:
        stream = Stream(server, max_tokens=4000)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(_APART_S)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        events = stream.result()
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
        assert server.process.wait(WAIT_S) == 0
    with serving(tmp_path, log) as server, server.client() as client:
        kept = client.get("/v1/agents/ada").json()
        assert kept["durable_tokens"] >= kept["tokens"] - 1 > 40
        assert server.stop() == 0


def test_the_grace_has_an_end(tmp_path: Path, log: Path) -> None:
    with serving(tmp_path, log, "--grace-s", "0.2") as server:
        stream = Stream(server, max_tokens=4000)
        assert server.stop() == 0
        assert json.loads(stream.result()[-1])["error"]["code"] == "shutting_down"


def test_an_idle_connection_is_no_reason_to_stay(tmp_path: Path, log: Path) -> None:
    with serving(tmp_path, log, "--grace-s", "0") as server:
        stream = Stream(server, max_tokens=4000)
        with server.client() as idle:  # keeps its connection alive
            assert idle.get("/").status_code == 200
            assert server.stop() == 0
        stream.result()


def test_a_signal_while_the_model_loads(tmp_path: Path, log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--port", str(port), "--data-dir", str(tmp_path / "data"))
    command = [sys.executable, "-m", "dormouse", "serve", *flags]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            assert startup_of(f"http://127.0.0.1:{port}") == (503, "starting")
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
    assert "KV format" not in log.read_text(), "it was announced as ready"


def startup_of(url: str) -> tuple[int, str]:
    """The first answer of a server that is starting."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            answer = httpx.get(f"{url}/health/startup")
        except httpx.TransportError:
            assert time.monotonic() < end, "the port never answered"
        else:
            return answer.status_code, answer.json()["status"]
