"""Keys and tenants, over HTTP: who comes in, and what each sees."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import Service, serving

from dormouse.api.access import check_exposure
from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.server import bind
from dormouse.domain.errors import CannotListen, InvalidRequest, KeyNotFound, StoreError
from dormouse.runtimes.fake import FakeRuntime


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def closed(tmp_path: Path, data: Path) -> Iterator[tuple[Service, KeyFile]]:
    """A server that watches the key file, which is still to be written."""
    with serving(tmp_path, FakeRuntime(64), Edge(keys=KeyRing(data))) as service:
        yield service, KeyFile(data)


def with_key(service: Service, key: str) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"x-api-key": key}, timeout=30)


def ask(client: httpx.Client, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body | {"temperature": 0} | fields)


def test_without_keys_everybody_may_do_everything(closed: tuple[Service, KeyFile]) -> None:
    service, _ = closed
    assert service.chat().status_code == 200
    assert service.http.get("/metrics").status_code == 200
    service.http.headers["authorization"] = "Bearer none"
    assert service.chat().status_code == 200


def test_the_first_key_closes_a_running_server(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    assert service.chat().status_code == 200
    key = file.add("a")
    refused = service.chat()
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"x-api-key": key},
        {"authorization": f"Bearer {key}"},
        {"authorization": f"bearer {key}"},
        {"x-api-key": "placeholder", "authorization": f"Bearer {key}"},
        {"x-api-key": key, "authorization": "Bearer placeholder"},
    ):
        assert service.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "dm-00000000-" + "x" * 43},
        {"authorization": "Basic abc"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer é"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/agents"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("OPTIONS", "/v1/models"),
    ],
)
def test_everything_else_needs_a_key(
    closed: tuple[Service, KeyFile], headers: dict[str, str], method: str, path: str
) -> None:
    service, file = closed
    file.add("a")
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert service.http.request(method, path, headers=raw).status_code == 401


def test_probes_need_no_key(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    file.add("a")
    assert service.http.get("/health").status_code == 200
    for path in ("/", "/api/hello"):
        assert service.http.head(path).status_code != 401


def test_a_changed_key_is_no_key(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    key, other = file.add("a"), file.add("a")
    swapped = key[:12] + other[12:]
    for wrong in (key[:-1], key + "x", key[:-1] + ("A" if key[-1] != "A" else "B"), swapped, key.upper()):
        with with_key(service, wrong) as client:
            assert client.get("/v1/models").status_code == 401, wrong
    with with_key(service, key) as client:
        assert client.get("/v1/models").status_code == 200


def test_a_revoked_key_is_refused_at_once_and_the_last_one_opens_nothing(
    closed: tuple[Service, KeyFile],
) -> None:
    service, file = closed
    key = file.add("a")
    with with_key(service, key) as client:
        assert client.get("/v1/models").status_code == 200
        file.revoke(file.all()[0].id)
        assert client.get("/v1/models").status_code == 401
        assert service.http.get("/v1/models").status_code == 401
    with pytest.raises(KeyNotFound):
        file.revoke(file.all()[0].id)


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1, "keys": []}', None])
def test_a_lost_file_does_not_open_the_server(closed: tuple[Service, KeyFile], damage: str | None) -> None:
    service, file = closed
    key = file.add("a")
    assert service.http.get("/v1/models").status_code == 401
    if damage is None:
        file.path.unlink()
    else:
        file.path.write_text(damage)
    assert service.http.get("/v1/models").status_code == 401
    with with_key(service, key) as client:
        assert client.get("/v1/models").status_code == 200


def test_administration_needs_an_admin_key(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    with with_key(service, file.add("a")) as user, with_key(service, file.add("a", is_admin=True)) as admin:
        for path in ("/metrics", "/admin", "/admin/state"):
            refused = user.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_needed")
            assert admin.get(path).status_code != 403
        assert user.get("/v1/models").status_code == 200


def test_refusals_speak_the_dialect_of_their_path(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    file.add("a")
    refused = service.http.post("/v1/messages", json={}, headers={"x-request-id": "mine"})
    assert refused.status_code == 401
    assert refused.headers["request-id"] == "mine"
    assert refused.json() == {
        "type": "error",
        "request_id": "mine",
        "error": {
            "type": "authentication_error",
            "message": "no API key; send one as x-api-key or as Authorization: Bearer",
        },
    }


def test_tenants_see_nothing_of_each_other(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    text = "the same words, longer than a few blocks of sixteen tokens are"
    with with_key(service, file.add("a")) as a, with_key(service, file.add("b")) as b:
        first = ask(a, text, prompt_cache_key="shared-name").json()["usage"]["prompt_tokens_details"]
        other = ask(b, text, prompt_cache_key="shared-name").json()["usage"]["prompt_tokens_details"]
        again = ask(a, text).json()["usage"]["prompt_tokens_details"]
        assert (first["cached_tokens"], other["cached_tokens"]) == (0, 0)
        assert again["cached_tokens"] > 60
        service.store.flush()
        assert b.delete("/v1/agents/shared-name").status_code == 200
        assert [agent["id"] for agent in a.get("/v1/agents").json()["data"]] == ["shared-name"]
        assert b.get("/v1/agents").json()["data"] == []
        missing, foreign = b.get("/v1/agents/nobody"), b.get("/v1/agents/shared-name")
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text == missing.text.replace("nobody", "shared-name")
        assert b.delete("/v1/agents/shared-name").status_code == 404
        assert ask(a, text, prompt_cache_key="shared-name").json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
    with with_key(service, file.add("a")) as colleague:
        shared = ask(colleague, text).json()["usage"]["prompt_tokens_details"]
        assert shared["cached_tokens"] > 60, "keys of one tenant share"


def test_tenants_cannot_use_each_others_ids(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    with with_key(service, file.add("a")) as a, with_key(service, file.add("b")) as b:
        body = {"model": "fake", "input": "the words of a", "max_output_tokens": 4}
        response_id = a.post("/v1/responses", json=body).json()["id"]
        assert a.get(f"/v1/responses/{response_id}").status_code == 200
        for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
            foreign = b.request(method, f"/v1/responses/{response_id}{path}")
            missing = b.request(method, f"/v1/responses/{response_id[:-1]}_{path}")
            assert foreign.status_code == missing.status_code == 404
        follow = {**body, "previous_response_id": response_id}
        assert b.post("/v1/responses", json=follow).status_code == 404
        assert a.post("/v1/responses", json=follow).status_code == 200


def test_anthropics_dialect_keeps_tenants_apart_too(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    text = "the same words, longer than a few blocks of sixteen tokens are"
    body: dict[str, Any] = {
        "model": "fake",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": text}],
    }
    with with_key(service, file.add("a")) as a, with_key(service, file.add("b")) as b:
        first = a.post("/v1/messages", json=body).json()
        assert b.post("/v1/messages", json=body).json()["usage"]["cache_read_input_tokens"] == 0
        assert a.post("/v1/messages", json=body).json()["usage"]["cache_read_input_tokens"] > 60
        asks = body | {"diagnostics": {"previous_message_id": first["id"]}}
        told = b.post("/v1/messages", json=asks).json()["diagnostics"]["cache_miss_reason"]
        assert told["type"] == "previous_message_not_found"


def test_tenants_do_not_meet_on_disk(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    with with_key(service, file.add("a")) as a, with_key(service, file.add("b")) as b:
        ask(a, "words " * 20)
        ask(b, "words " * 20)
    service.store.flush()
    folders = sorted(service_folder.name for service_folder in (file.path.parent / "blocks").iterdir())
    names = [{path.name for path in (file.path.parent / "blocks" / name).rglob("*")} for name in folders]
    assert len(names) == 2
    files = [{name for name in some if name.endswith(".safetensors")} for some in names]
    assert files[0]
    assert not files[0] & files[1]


def test_no_metric_says_who_asked(closed: tuple[Service, KeyFile]) -> None:
    service, file = closed
    admin_key = file.add("tenant-of-mine", is_admin=True)
    with with_key(service, admin_key) as admin:
        ask(admin, "secret words", prompt_cache_key="agent-of-mine")
        admin.get("/v1/agents/agent-of-mine")
        admin.get("/v1/models/model-of-mine")
        admin.request("BREW", "/path-of-mine")
        shown = admin.get("/metrics").text
    assert "dormouse_replies_total" in shown
    assert "of-mine" not in shown
    assert "BREW" not in shown
    assert admin_key not in shown
    assert file.all()[0].id not in shown


def test_the_key_file_holds_no_key_and_is_its_owners(data: Path) -> None:
    file = KeyFile(data)
    key = file.add("a", name="laptop")
    text = file.path.read_text()
    assert key not in text
    assert key[len("dm-00000000-") :] not in text
    assert "laptop" in text
    KeyRing(data).find(key)
    assert {path.name for path in data.iterdir()} == {"keys.json", "keys.lock", "keys-used.json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in data.iterdir())


def test_the_last_use_is_known_to_the_minute(data: Path) -> None:
    file, now = KeyFile(data), [1000.0]
    key = file.add("a")
    ring = KeyRing(data, clock=lambda: now[0])
    assert file.all()[0].used_at is None
    for moment, noted in ((1000.0, 1000.0), (1059.0, 1000.0), (1060.0, 1060.0)):
        now[0] = moment
        assert ring.find(key) is not None
        assert file.all()[0].used_at == noted
    assert KeyRing(data).find("dm-00000000-" + "x" * 43) is None


@pytest.mark.parametrize("tenant", ["", "a/b", "a b", "ü", "x" * 65, ".hidden", "a\n"])
def test_bad_tenants_are_refused(data: Path, tenant: str) -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        KeyFile(data).add(tenant)
    with pytest.raises(InvalidRequest, match="name"):
        KeyFile(data).add("a", name="tab\t")
    assert not KeyFile(data).path.exists()


def test_a_damaged_file_stops_the_start(data: Path) -> None:
    file = KeyFile(data)
    file.add("a")
    file.path.write_text(json.dumps({"format": 2, "keys": []}))
    with pytest.raises(StoreError, match="another version"):
        KeyRing(data)
    file.path.write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        KeyRing(data)
    with pytest.raises(StoreError):
        file.add("b")


def test_other_machines_need_a_key(data: Path) -> None:
    with bind("0.0.0.0", 0) as everywhere, bind("127.0.0.1", 0) as here:
        with pytest.raises(CannotListen, match="dormouse keys add"):
            check_exposure(everywhere, KeyRing(data), insecure=False)
        check_exposure(here, KeyRing(data), insecure=False)
        check_exposure(everywhere, KeyRing(data), insecure=True)
        KeyFile(data).add("a")
        check_exposure(everywhere, KeyRing(data), insecure=False)
    with socket.socket(socket.AF_INET6) as six:
        six.bind(("::", 0))
        KeyFile(data).path.unlink()
        with pytest.raises(CannotListen):
            check_exposure(six, KeyRing(data), insecure=False)
