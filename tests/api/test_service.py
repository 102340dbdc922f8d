"""The server around the replies: agents, health, floods, disconnects, the end."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import islice
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from tests.api.conftest import Service
from tests.engine.harness import WAIT_S, GatedRuntime

from dormouse.api.server import bind
from dormouse.domain.errors import CannotListen
from dormouse.domain.plan import Plan
from dormouse.engine.loop import MOST_FAILED
from dormouse.runtimes.base import Logits
from dormouse.runtimes.fake import FakeRuntime


@pytest.fixture
def gated(runtime: FakeRuntime) -> GatedRuntime:
    assert isinstance(runtime, GatedRuntime)
    return runtime


def until_aborted(service: Service) -> None:
    """One reply was, and the engine has been told."""
    deadline = time.monotonic() + WAIT_S
    while 'dormouse_replies_total{outcome="aborted"} 1.0' not in service.http.get("/metrics").text:
        assert time.monotonic() < deadline


def test_agents_are_listed_shown_and_deleted(service: Service) -> None:
    for name in ("a/b", "ünï"):
        service.http.post(
            "/v1/chat/completions",
            json={
                "model": "fake",
                "messages": [{"role": "user", "content": "hello " * 10}],
                "max_tokens": 5,
                "prompt_cache_key": name,
            },
        )
    service.store.flush()
    listed = service.http.get("/v1/agents").json()["data"]
    assert {agent["id"] for agent in listed} == {"a/b", "ünï"}
    shown = service.http.get(f"/v1/agents/{quote('a/b', safe='')}").json()
    assert shown["tokens"] == shown["durable_tokens"] + 1 > 60
    assert shown["state"] == "awake"
    assert shown["stored_bytes"] > 0
    gone = service.http.delete("/v1/agents/a/b")
    assert gone.json() == {"id": "a/b", "object": "agent.deleted", "deleted": True}
    missing = service.http.get("/v1/agents/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "agent_not_found")
    assert service.http.delete("/v1/agents/a/b").status_code == 404
    assert [agent["id"] for agent in service.http.get("/v1/agents").json()["data"]] == ["ünï"]


@pytest.mark.parametrize(
    ("host", "port", "hint"), [("127.0.0.1", None, "--port"), ("no.such.host.invalid", 0, "--host")]
)
def test_an_address_that_is_not_to_be_had(service: Service, host: str, port: int | None, hint: str) -> None:
    taken = int(service.url.rsplit(":", 1)[1])
    with pytest.raises(CannotListen, match=hint):
        bind(host, taken if port is None else port)


def test_health_is_ok(service: Service) -> None:
    service.chat()
    health = service.http.get("/health").json()
    assert (health["status"], health["reasons"]) == ("ok", [])
    assert health["engine"]["generated_tokens"] == 8


def test_health_says_why_it_is_degraded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from dormouse.store.health import HealthReason

    reason = HealthReason("disk_full", "no space")
    monkeypatch.setattr(service.store, "health", lambda: (reason,))
    health = service.http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "degraded"
    assert health.json()["reasons"] == [{"code": "disk_full", "message": "no space"}]


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_a_flood_gets_answers_or_429(service: Service, gated: GatedRuntime) -> None:
    with ThreadPoolExecutor(12) as threads:
        calls = [threads.submit(service.chat, f"hello {i}") for i in range(12)]
        # Two run and two wait, and none of them ends while the gate is shut.
        refused = [call.result() for call in islice(as_completed(calls, timeout=WAIT_S), 8)]
        gated.run_freely()
        codes = [call.result().status_code for call in calls]
    assert (codes.count(200), codes.count(429)) == (4, 8)
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert service.chat().status_code == 200


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 500}]}),
        ("completions", {"prompt": "x" * 500, "max_tokens": 4000}),
        ("messages", {"messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 4000}),
        ("responses", {"input": "x" * 500}),
    ],
)
def test_a_disconnect_aborts(
    service: Service, gated: GatedRuntime, path: str, given: dict[str, Any], stream: bool
) -> None:
    body = {"model": "fake", "stream": stream} | given
    with closing(http.client.HTTPConnection(service.url.removeprefix("http://"))) as client:
        client.request("POST", f"/v1/{path}", json.dumps(body), {"content-type": "application/json"})
        assert gated.started.acquire(timeout=WAIT_S)
    until_aborted(service)
    gated.run_freely()
    # The next request is answered only when the first one, which would run to the end of its
    # context, has gone or has finished; its tokens tell which.
    service.chat("another")
    health = service.http.get("/health").json()["engine"]
    assert health["num_running"] == 0
    assert health["generated_tokens"] < 100


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_a_disconnect_in_decode_aborts_and_keeps_what_was_said(service: Service, gated: GatedRuntime) -> None:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "prompt_cache_key": "a",
    }
    gated.allow.release(3)
    with (
        httpx.Client(base_url=service.url) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # held: a generator that nobody holds closes the connection
        assert '"role":"assistant"' in next(lines)
        for _ in range(4):  # the prompt, two tokens, and the step that the client does not wait for
            assert gated.started.acquire(timeout=WAIT_S)
    until_aborted(service)
    gated.run_freely()
    service.chat("another")
    assert service.http.get("/health").json()["engine"]["generated_tokens"] < 100
    kept = service.http.get("/v1/agents/a").json()["tokens"]
    assert len("user: hello\nassistant: ") + 3 <= kept < 100


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_the_end_of_the_server_ends_streams_with_an_error(service: Service, gated: GatedRuntime) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with service.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        gated.allow.release(3)
        assert '"role":"assistant"' in next(lines)
        stopper = threading.Thread(target=service.served.engine.stop, args=(0.0,))
        stopper.start()
        gated.step_until_ended(stopper)
        rest = "".join(lines)
    assert '"code":"shutting_down"' in rest
    assert "[DONE]" not in rest
    refused = service.chat()
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert service.http.get("/health").json()["status"] == "draining"


class Dying(FakeRuntime):
    def forward(self, plan: Plan) -> Logits:
        raise MemoryError(f"no room for {plan.num_tokens} tokens")


@pytest.mark.parametrize("runtime", [Dying], indirect=True)
def test_a_dead_engine_is_loud(service: Service) -> None:
    answers = [service.chat() for _ in range(MOST_FAILED + 1)]
    assert {answer.status_code for answer in answers} == {500}
    assert answers[0].json()["error"]["code"] == "step_failed"
    assert answers[-1].json()["error"]["code"] == "engine_dead"
    health = service.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "dead")
