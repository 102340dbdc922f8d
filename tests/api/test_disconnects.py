"""Clients that go away at any point of a request or a stream, in every dialect: nothing of them stays."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from tests.api.conftest import Service, serving
from tests.engine.harness import WAIT_S

from dormouse.runtimes.fake import FakeRuntime

TOKENS = 300
PROMPT = "the quick brown fox jumps over the lazy dog " * 6
MESSAGES = [{"role": "user", "content": PROMPT}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"messages": MESSAGES, "max_tokens": TOKENS},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": TOKENS, "n": 2},
    "/v1/completions": {"prompt": [PROMPT, "hello"], "max_tokens": TOKENS},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": TOKENS},
}


@dataclass(frozen=True)
class Leaver:
    """Sends a part of a request, reads a number of bytes, and is gone: by a reset, or politely."""

    path: str
    is_streaming: bool
    share_sent: float
    num_read: int
    resets: bool

    def visit(self, url: str) -> None:
        """Come and go."""
        body = json.dumps({"model": "fake", "stream": self.is_streaming, **REQUESTS[self.path]}).encode()
        head = f"POST {self.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        request = f"{head}x-agent-id: leaver\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=WAIT_S) as client:
            client.sendall(request[: round(self.share_sent * len(request))])
            left = self.num_read if self.share_sent == 1 else 0
            while left > 0 and (got := client.recv(min(left, 4096))):
                # A whole reply is its own end: nothing would come after it on this connection.
                left = 0 if got.endswith(b"0\r\n\r\n") else left - len(got)
            if self.resets:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


leavers = st.builds(
    Leaver,
    st.sampled_from(sorted(REQUESTS)),
    st.booleans(),
    st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.3]),
    st.integers(0, 30_000),
    st.booleans(),
).filter(lambda leaver: leaver.is_streaming or leaver.num_read < 50)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("leavers"), FakeRuntime(128)) as service:
        yield service


@pytest.mark.timeout(240)
def test_nothing_stays_behind(service: Service) -> None:
    service.chat().raise_for_status()
    tasks = num_tasks()
    num_cut = 0

    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.lists(leavers, min_size=1, max_size=3))
    def check(several: list[Leaver]) -> None:
        nonlocal num_cut
        for leaver in several:
            leaver.visit(service.url)
        num_cut += service.served.engine.num_open > 0
        wait_until_idle(service, tasks)
        answer = service.chat("still there?")
        assert answer.json()["usage"]["completion_tokens"] == 8

    check()
    assert num_cut > 5, "some left while their answer was being made"


def wait_until_idle(service: Service, tasks: int) -> None:
    """Return once no request, sequence, page or task is in use. Fails when that does not come."""
    engine = service.served.engine
    end = time.monotonic() + WAIT_S
    while True:
        stats = engine.stats()
        used = {
            "requests": engine.num_open,
            "sequences": stats.num_running + stats.num_waiting + stats.num_loading,
            "pages": stats.pages_used,
            "tasks": max(0, num_tasks() - tasks),
        }
        if not any(used.values()):
            return
        assert time.monotonic() < end, used


def num_tasks() -> int:
    """Tasks of this process that have not ended."""
    # By type: to ask some modules' objects for their class is to be warned of them.
    return sum(type(one) is asyncio.Task and not one.done() for one in gc.get_objects())
