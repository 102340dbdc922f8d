"""What one tenant can learn of another: nothing that is asked, counted, named or measured in steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import Service, serving

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.domain.plan import Plan
from dormouse.runtimes.base import Logits
from dormouse.runtimes.fake import FakeRuntime

SECRET = "the words of one tenant, longer than a few blocks of sixteen tokens are, canary-7431"


class RecordingRuntime(FakeRuntime):
    """Remembers what it was given to compute."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.steps: list[tuple[tuple[int, int, int], ...]] = []

    def forward(self, plan: Plan) -> Logits:
        chunks = ((chunk.start, len(chunk.tokens), chunk.num_logits) for chunk in plan.chunks)
        self.steps.append(tuple(chunks))
        return super().forward(plan)


@dataclass
class Two:
    """A server with two tenants."""

    service: Service
    runtime: RecordingRuntime
    a: httpx.Client
    b: httpx.Client

    def steps_of(self, client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
        """The shape of every step that a request took, and its usage."""
        self.runtime.steps.clear()
        answer = client.post(path, json=body).raise_for_status().json()
        return list(self.runtime.steps), answer["usage"]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    file = KeyFile(data)
    keys = [file.add("a"), file.add("b")]
    runtime = RecordingRuntime(128)
    with serving(tmp_path, runtime, Edge(keys=KeyRing(data))) as service:
        a, b = (httpx.Client(base_url=service.url, headers={"x-api-key": key}, timeout=30) for key in keys)
        with a, b:
            yield Two(service, runtime, a, b)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 4,
        "temperature": 0,
    },
    "/v1/completions": {"prompt": SECRET, "max_tokens": 4, "temperature": 0},
    "/v1/messages": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "temperature": 0},
    "/v1/responses": {"input": SECRET, "max_output_tokens": 4, "temperature": 0},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_a_prompt_costs_another_tenant_as_much_as_if_nobody_had_asked(
    two: Two, path: str, from_disk: bool
) -> None:
    """The same steps over the same chunks; one's own second request takes fewer."""
    body = {"model": "fake"} | BODIES[path]
    fresh = two.steps_of(two.a, path, body)
    if from_disk:
        assert two.service.store.flush()
    others = two.steps_of(two.b, path, body)
    again = two.steps_of(two.a, path, body)
    assert others == fresh
    assert again[0] != fresh[0], "and a hit would have been seen"


def test_replies_are_remembered_for_their_tenant_alone(two: Two) -> None:
    """What was generated is spliced into its own tenant's prompts only."""
    body = {"model": "fake", "max_tokens": 12, "temperature": 0}
    asked = [{"role": "user", "content": "say something"}]
    reply = two.a.post("/v1/chat/completions", json=body | {"messages": asked}).json()["choices"][0][
        "message"
    ]
    replayed = [
        *asked,
        {"role": "assistant", "content": reply["content"]},
        {"role": "user", "content": "more"},
    ]
    counts = [
        client.post("/v1/messages/count_tokens", json={"model": "fake", "messages": replayed}).json()
        for client in (two.a, two.b)
    ]
    assert counts[0].keys() == counts[1].keys()
    own, others = (
        two.steps_of(client, "/v1/chat/completions", body | {"messages": replayed})
        for client in (two.a, two.b)
    )
    assert others[1]["prompt_tokens_details"]["cached_tokens"] == 0
    assert own[1]["prompt_tokens_details"]["cached_tokens"] > 0


AGENT_PATHS = [
    ("GET", ""),
    ("PATCH", ""),
    ("DELETE", ""),
    ("GET", "/messages"),
    ("POST", "/messages"),
    ("GET", "/why"),
    ("GET", "/export"),
    ("POST", "/sleep"),
    ("POST", "/wake"),
    ("GET", "/checkpoints"),
    ("POST", "/checkpoints"),
    ("DELETE", "/checkpoints/t"),
    ("POST", "/fork"),
    ("POST", "/rollback"),
]
AGENT_BODIES = {
    "": {"pinned": True},
    "/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/checkpoints": {"name": "t"},
    "/fork": {"name": "other"},
    "/rollback": {"checkpoint": "t"},
}


@pytest.mark.parametrize(("method", "action"), AGENT_PATHS)
def test_an_agent_of_another_tenant_is_one_that_does_not_exist(two: Two, method: str, action: str) -> None:
    """Word for word, header for header, whatever is asked of it."""
    two.a.post("/v1/agents", json={"name": "theirs"}).raise_for_status()
    body = AGENT_BODIES["/messages"]
    two.a.post("/v1/agents/theirs/messages", json=body).raise_for_status()
    two.a.post("/v1/agents/theirs/checkpoints", json={"name": "t"}).raise_for_status()
    sent = AGENT_BODIES.get(action) if method in ("POST", "PATCH") else None
    foreign = two.b.request(method, f"/v1/agents/theirs{action}", json=sent)
    missing = two.b.request(method, f"/v1/agents/nobody{action}", json=sent)
    assert foreign.status_code == missing.status_code == 404, foreign.text
    assert foreign.text == missing.text.replace("nobody", "theirs")
    assert _comparable(foreign) == _comparable(missing)
    assert two.a.get("/v1/agents/theirs").status_code == 200


def test_names_that_another_tenant_took_are_free(two: Two) -> None:
    two.a.post("/v1/agents", json={"name": "one"}).raise_for_status()
    exported = two.a.get("/v1/agents/one/export").content
    assert two.b.post("/v1/agents", json={"name": "one"}).status_code == 201
    assert two.b.post("/v1/agents/one/fork", json={"name": "two"}).status_code == 201
    taken = two.b.post("/v1/agents/import?name=one", content=exported)
    assert taken.status_code in (400, 409)  # its own
    assert len(two.a.get("/v1/agents").json()["data"]) == 1


def test_what_is_told_to_everybody_tells_nothing_of_tenants(two: Two) -> None:
    """Models, health, errors and the API's document are the same before and after another's work."""

    def seen() -> list[str]:
        paths = (
            "/",
            "/v1/models",
            "/v1/models/fake",
            "/health",
            "/health/ready",
            "/openapi.json",
            "/v1/agents",
        )
        answers = [two.b.get(path) for path in paths]
        answers.append(two.b.get("/v1/responses/resp_0"))
        answers.append(two.b.post("/v1/responses", json={"model": "fake", "previous_response_id": "x"}))
        return [f"{answer.status_code} {answer.text} {_comparable(answer)}" for answer in answers]

    before = seen()
    for path, body in BODIES.items():
        two.a.post(path, json={"model": "fake"} | body, headers={"x-agent-id": "theirs"}).raise_for_status()
    two.service.store.flush()
    assert seen() == before
    assert two.b.get("/metrics").status_code == 403
    assert two.b.get("/admin/state").status_code == 403


def test_why_and_diagnostics_show_ones_own_words_only(two: Two) -> None:
    body = {"model": "fake"} | BODIES["/v1/chat/completions"]
    for client in (two.a, two.b):
        client.post("/v1/chat/completions", json=body, headers={"x-agent-id": "same"}).raise_for_status()
    other = body | {"messages": [{"role": "user", "content": "something else"}]}
    two.b.post("/v1/chat/completions", json=other, headers={"x-agent-id": "same"}).raise_for_status()
    assert two.a.get("/v1/agents/same/why").json()["decision"]["diverged"] is None
    two.b.delete("/v1/agents/same").raise_for_status()
    assert two.a.get("/v1/agents/same/why").json()["decision"] is not None


def _comparable(answer: httpx.Response) -> dict[str, str]:
    """The headers, without what is of the moment."""
    kept = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
    return {
        name: re.sub(r"nobody|theirs", "", value) for name, value in kept.items() if name != "content-length"
    }
