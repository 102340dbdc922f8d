"""Web pages and a server without keys: DNS rebinding, and simple requests of other sites."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.conftest import Service, serving

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.runtimes.fake import FakeRuntime

PAGE = "http://chat.example"
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server without keys that knows one more name and one web page."""
    edge = Edge(allowed_hosts=("gpubox.lan",), cors_origins=(PAGE,))
    with serving(tmp_path_factory.mktemp("hosts"), FakeRuntime(64), edge) as service:
        yield service


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "app.localhost", "127.0.0.1", "127.1.2.3:80", "[::1]:8000"),
        *("192.168.1.7", "gpubox.lan", "GPUBOX.LAN.", f"{socket.gethostname()}:8000"),
    ],
)
def test_a_server_without_keys_answers_to_its_names(opened: Service, host: str) -> None:
    assert opened.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "xlocalhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/v1/messages", "/docs", "/nothing"])
def test_a_rebound_name_gets_nothing(opened: Service, host: str, path: str) -> None:
    answer = opened.http.get(path, headers={"host": host, "x-request-id": "mine"})
    assert answer.status_code == 403
    assert "--allowed-hosts" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == "mine"
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    "origin", [EVIL, "https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/agents/a/sleep"),
        ("POST", "/v1/agents/import"),
        ("DELETE", "/v1/agents/a"),
        ("GET", "/v1/agents"),
    ],
)
def test_pages_of_other_sites_change_nothing(opened: Service, origin: str, method: str, path: str) -> None:
    """A simple request needs no preflight: the browser sends it, and hides no more than its answer."""
    answer = opened.http.request(method, path, headers={"origin": origin, "content-type": "text/plain"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "address_refused"


def test_pages_that_are_named_and_programs_may_call(opened: Service) -> None:
    own = opened.url
    for origin in (PAGE, own, "vscode-webview://abc", "app://obsidian.md", "tauri://localhost"):
        assert opened.http.get("/v1/models", headers={"origin": origin}).status_code == 200, origin
    assert opened.chat().status_code == 200


def test_json_of_a_simple_request_is_not_read(opened: Service) -> None:
    """What a form of another site can send is never taken for JSON."""
    body = '{"model": "fake", "prompt": "x", "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = opened.http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 400, kind


def test_keys_make_names_free(tmp_path: Path) -> None:
    """Behind a proxy the server has any name; a page without the key gets nothing anyway."""
    (tmp_path / "data").mkdir()
    key = KeyFile(tmp_path / "data").add("a")
    with serving(tmp_path, FakeRuntime(64), Edge(keys=KeyRing(tmp_path / "data"))) as service:
        foreign = {"host": "chat.example", "origin": EVIL}
        assert service.http.get("/v1/models", headers=foreign).status_code == 401
        assert service.http.get("/v1/models", headers=foreign | {"x-api-key": key}).status_code == 200


def test_any_name_and_any_page_if_that_is_asked_for(tmp_path: Path) -> None:
    edge = Edge(allowed_hosts=("*",), cors_origins=("*",))
    with serving(tmp_path, FakeRuntime(64), edge) as service:
        assert (
            service.http.get("/v1/models", headers={"host": "x.example", "origin": EVIL}).status_code == 200
        )
