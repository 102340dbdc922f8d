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

import httpx
import pytest
from benchmarks.server import Server, serve

pytestmark = [pytest.mark.usefixtures("smollm2", "strict"), pytest.mark.timeout(600)]

ARENA = ("--arena-tokens", "8192")
WAIT_S = 240.0
_APART_S = 0.6
"""Signals closer than half a second are one wish."""
_POLL_S = 0.01
_STARTS = 5
_DRAINING_S = 10.0
"""A reply that is to end within the grace lasts about so long: time enough to ask meanwhile."""


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
        self.events: list[str] = []
        self._news = threading.Condition()
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
        self.wait_for(3)

    def wait_for(self, num_events: int) -> None:
        """Return when so many have come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.events) >= num_events, WAIT_S)

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
                    with self._news:
                        self.events.append(line.removeprefix("data: "))
                        self._news.notify_all()


@contextmanager
def serving(folder: Path, log: Path, *flags: str) -> Iterator[Server]:
    with serve(folder / "data", *ARENA, *flags, log=log) as server:
        yield server


def tokens_per_s(server: Server) -> float:
    """The best of three short replies: a pause of this process can only lower it."""

    def pace() -> float:
        began = time.monotonic()
        Stream(server, max_tokens=20, agent="pace").result()
        return 20 / (time.monotonic() - began)

    return max(pace() for _ in range(3))


def wait_until_draining(client: httpx.Client) -> None:
    """Return when the server has heard a signal, and says so."""
    end = time.monotonic() + WAIT_S
    while (health := client.get("/health")).status_code == 200:
        assert time.monotonic() < end, "the server heard no signal"
    assert health.json()["status"] == "draining"


def test_a_running_reply_ends_within_the_grace(tmp_path: Path, log: Path) -> None:
    with serving(tmp_path, log, "--grace-s", "600") as server, server.client() as client:
        client.get("/health")  # connects
        stream = Stream(server, max_tokens=round(_DRAINING_S * tokens_per_s(server)))
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(client)
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
    with serving(tmp_path, log, "--grace-s", "3600") as server, server.client() as client:
        client.get("/health")  # connects
        stream = Stream(server, max_tokens=4000)
        stream.wait_for(12)
        server.process.send_signal(signal.SIGTERM)
        wait_until_draining(client)
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
    # The model may be there before this process has asked, or before its signal arrives.
    assert any(is_ended_before_the_model(tmp_path / "data", log) for _ in range(_STARTS))


def is_ended_before_the_model(data: Path, log: Path) -> bool:
    """Start a server, and end it as soon as it answers; whether it was starting then, and never got ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dormouse", "serve", "--port", str(port), "--data-dir", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            first = startup_of(f"http://127.0.0.1:{port}")
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    with log.open("a") as file:
        file.write(printed)
    assert process.returncode == 0, printed
    return first == (503, "starting") and "KV format" not in printed


def startup_of(url: str) -> tuple[int, str]:
    """The first answer of a server that is starting."""
    end = time.monotonic() + WAIT_S
    with httpx.Client(timeout=WAIT_S) as client:
        while True:
            try:
                answer = client.get(f"{url}/health/startup")
            except httpx.TransportError:
                assert time.monotonic() < end, "the port never answered"
                time.sleep(_POLL_S)
            else:
                return answer.status_code, answer.json()["status"]
