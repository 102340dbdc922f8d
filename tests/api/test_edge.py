"""The edge: request ids and CORS, also on answers that are no success."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.api.conftest import Service, serving

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.rate_limits import RateLimits
from dormouse.models.chat import ChatModel
from dormouse.runtimes.fake import FakeRuntime

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type, x-api-key, anything",
}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Service]:
    """A server with a key, a small rate limit, and one web origin."""
    (tmp_path / "data").mkdir()
    key = KeyFile(tmp_path / "data").add("a")
    edge = Edge(
        keys=KeyRing(tmp_path / "data"),
        limits=RateLimits(requests_per_minute=4),
        cors_origins=(ORIGIN,),
    )
    with serving(tmp_path, FakeRuntime(64), edge) as service:
        service.http.headers.update({"x-api-key": key, "origin": ORIGIN})
        yield service


def test_origins_are_closed_by_default(service: Service) -> None:
    for answer in (
        service.http.get("/v1/models", headers={"origin": ORIGIN}),
        service.http.options("/v1/chat/completions", headers=PREFLIGHT),
    ):
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_preflight_needs_no_key(web: Service) -> None:
    del web.http.headers["x-api-key"]
    answer = web.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "anything" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    elsewhere = web.http.options(
        "/v1/chat/completions", headers=PREFLIGHT | {"origin": "http://evil.example"}
    )
    assert elsewhere.status_code == 400
    assert "access-control-allow-origin" not in elsewhere.headers


def test_every_kind_of_answer_may_be_read_by_the_page(web: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> list[int]:
        raise RuntimeError("a bug")

    answers = [web.chat(), web.chat("x" * 200_000), web.chat(n=99)]
    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "render_conversation", broken)
        answers.append(web.chat())
    answers.append(web.chat())
    del web.http.headers["x-api-key"]
    answers.append(web.chat())
    assert [answer.status_code for answer in answers] == [200, 413, 400, 500, 429, 401]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        shown = answer.headers["access-control-expose-headers"]
        assert {"x-request-id", "retry-after"} <= {name.strip() for name in shown.split(",")}
        assert answer.headers["x-request-id"].startswith("req_")
    assert answers[3].json()["error"]["message"] == "internal error; see the server's log"


def test_another_origin_is_not_named(web: Service) -> None:
    answer = web.http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("sent", ["abc-1.2_3:4", "x" * 128])
def test_a_usable_request_id_is_taken(service: Service, sent: str) -> None:
    headers = {"x-request-id": sent}
    assert service.http.get("/v1/models", headers=headers).headers["x-request-id"] == sent
    assert service.http.get("/nothing", headers=headers).headers["x-request-id"] == sent
    refused = service.http.post("/v1/messages/nothing", headers=headers)
    assert refused.headers["request-id"] == refused.json()["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "<script>", "é", "a\tb"])
def test_an_unusable_request_id_is_replaced(service: Service, sent: str) -> None:
    answer = service.http.get("/health", headers=[(b"x-request-id", sent.encode())])
    assert answer.headers["x-request-id"].startswith("req_")


def test_ids_differ_and_only_anthropics_paths_have_two_names(service: Service) -> None:
    answers: list[httpx.Response] = [service.chat(), service.chat(stream=True), service.http.get("/health")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    assert not any("request-id" in answer.headers for answer in answers)
