"""`/v1/agents` over the fake runtime: made, listed, forked, tagged, put to sleep, moved, deleted."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from tests.api.conftest import Service
from tests.engine.harness import WAIT_S, GatedRuntime

from dormouse.api import agent_files
from dormouse.runtimes.fake import FakeRuntime

AGENTS = "/v1/agents"


def say(service: Service, agent: str, text: str, **fields: Any) -> dict[str, Any]:
    answer = service.chat(text, prompt_cache_key=agent, **fields)
    assert answer.status_code == 200, answer.text
    service.store.flush()
    body: dict[str, Any] = answer.json()
    return body


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def cached(reply: dict[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_an_agent_is_made_changed_and_found(service: Service) -> None:
    body = {
        "name": "team/ada",
        "system": "be brief",
        "pinned": True,
        "quota_bytes": 1000,
        "kv_format": "bf16",
    }
    made = service.http.post(AGENTS, json=body)
    assert made.status_code == 201
    shown = service.http.get(f"{AGENTS}/team/ada").json()
    assert shown == made.json()
    assert (shown["tokens"], shown["state"], shown["kv_format"], shown["model"]) == (
        0,
        "asleep",
        "bf16",
        "fake",
    )
    assert (shown["pinned"], shown["quota_bytes"], shown["forked_from"]) == (True, 1000, None)
    assert code(service.http.post(AGENTS, json=body)) == (409, "agent_exists")
    changed = service.http.patch(f"{AGENTS}/team/ada", json={"pinned": False})
    assert (changed.json()["pinned"], changed.json()["quota_bytes"]) == (False, 1000)
    assert service.store.notebook.get("default", "agent", "team/ada") is not None
    assert code(service.http.patch(f"{AGENTS}/nobody", json={})) == (404, "agent_not_found")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "a/fork"}, 400),
        ({"name": "a/checkpoints/b"}, 400),
        ({"name": "a/"}, 400),
        ({"name": ""}, 400),
        ({"name": "a", "kv_format": "q4"}, 400),
        ({"name": "a", "quota_bytes": -1}, 400),
        ({"name": "a", "colour": "red"}, 400),
        ({"name": "a", "model": "other"}, 404),
        ({"name": "fork"}, 201),
    ],
)
def test_what_cannot_be_made_is_refused(service: Service, body: dict[str, Any], status: int) -> None:
    assert service.http.post(AGENTS, json=body).status_code == status
    assert len(service.http.get(AGENTS).json()["data"]) == (status == 201)


def test_lists_have_filters_and_pages(service: Service) -> None:
    for number in range(5):
        service.http.post(AGENTS, json={"name": f"n{number}", "pinned": number == 2})
    say(service, "x", "hello")

    def ids(**params: Any) -> list[str]:
        return [row["id"] for row in service.http.get(AGENTS, params=params).json()["data"]]

    assert ids() == ["x", "n4", "n3", "n2", "n1", "n0"]
    assert ids(state="awake") == ["x"]
    assert ids(state="asleep", prefix="n", pinned=False) == ["n4", "n3", "n1", "n0"]
    assert ids(pinned=True) == ["n2"]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = service.http.get(AGENTS, params=query).json()
        seen += [row["id"] for row in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["next"]
        service.http.delete(f"{AGENTS}/{seen[-1]}")  # a cursor outlives what it points at
    assert seen == ["x", "n4", "n3", "n2", "n1", "n0"]
    assert page["next"] is None
    assert service.http.get(AGENTS, params={"after": "?"}).status_code == 400
    assert service.http.get(AGENTS, params={"limit": 0}).status_code == 400


def test_a_fork_continues_from_the_same_blocks(service: Service) -> None:
    say(service, "a/b", "hello " * 20)
    written = service.store.stats().counts["bytes_written"]
    fork = service.http.post(f"{AGENTS}/a/b/fork", json={"name": "c"})
    assert fork.status_code == 201
    tokens = service.http.get(f"{AGENTS}/{quote('a/b', safe='')}").json()["tokens"]
    assert fork.json()["forked_from"] == f"a/b@{tokens}"
    assert service.store.stats().counts["bytes_written"] == written
    service.http.delete(f"{AGENTS}/a/b")
    assert cached(say(service, "c", "hello " * 20)) > 100, "the fork has the blocks"
    assert code(service.http.post(f"{AGENTS}/c/fork", json={"name": "c"})) == (409, "agent_exists")
    assert code(service.http.post(f"{AGENTS}/no/fork", json={"name": "d"})) == (404, "agent_not_found")


def test_checkpoints_and_rolling_back(service: Service) -> None:
    say(service, "a/b", "one")
    made = service.http.post(f"{AGENTS}/a/b/checkpoints", json={"name": "t"})
    assert made.status_code == 201
    before = made.json()["tokens"]
    assert code(service.http.post(f"{AGENTS}/a/b/checkpoints", json={"name": "t"})) == (409, "agent_exists")
    say(service, "a/b", "one, and much more than that")
    assert service.http.get(f"{AGENTS}/a/b").json()["tokens"] > before
    listed = service.http.get(f"{AGENTS}/a/b/checkpoints").json()["data"]
    assert [(row["name"], row["tokens"]) for row in listed] == [("t", before)]
    back = service.http.post(f"{AGENTS}/a/b/rollback", json={"checkpoint": "t"}).json()
    assert (back["tokens"], back["checkpoints"]) == (before, 1)
    fork = service.http.post(f"{AGENTS}/a/b/fork", json={"name": "c", "checkpoint": "t"}).json()
    assert fork["tokens"] == before
    assert service.http.delete(f"{AGENTS}/a/b/checkpoints/t").status_code == 200
    gone = service.http.post(f"{AGENTS}/a/b/rollback", json={"checkpoint": "t"})
    assert code(gone) == (404, "checkpoint_not_found")


def test_sleep_gives_memory_back_and_changes_no_word(service: Service) -> None:
    first = say(service, "a", "hello " * 20)
    say(service, "b", "hello " * 20 + "and more")
    row = service.http.post(f"{AGENTS}/a/sleep").json()
    assert row["released_blocks"] >= 1
    assert row["state"] in ("asleep", "dozing"), "blocks of b stay"
    assert service.http.get(f"{AGENTS}/b").json()["state"] == "awake"
    assert service.http.post(f"{AGENTS}/a/sleep").json()["released_blocks"] == 0
    woken = service.http.post(f"{AGENTS}/a/wake")
    assert (woken.status_code, woken.json()["reading_blocks"] > 0) == (202, True)
    again = say(service, "a", "hello " * 20)
    assert again["choices"] == first["choices"]
    assert cached(again) == again["usage"]["prompt_tokens"] - 1, "nothing was lost"
    assert service.http.post(f"{AGENTS}/a/wake").json()["reading_blocks"] == 0
    for action in ("sleep", "wake"):
        assert code(service.http.post(f"{AGENTS}/nobody/{action}")) == (404, "agent_not_found")


def test_a_deleted_agent_is_found_nowhere(service: Service, tmp_path: Path) -> None:
    first = say(service, "a", "a secret " * 20)
    assert cached(first) == 0
    service.store.notebook.put("default", "why", "a", b"{}")
    assert service.http.delete(f"{AGENTS}/a").status_code == 200
    assert service.store.notebook.page("default", "why") == []
    again = service.chat("a secret " * 20).json()
    assert cached(again) == 0, "neither in memory nor on disk"
    assert again["choices"] == first["choices"]
    assert not list((tmp_path / "data" / "quarantine").iterdir())


def test_deletion_leaves_what_others_have(service: Service) -> None:
    say(service, "a", "hello " * 20)
    say(service, "b", "hello " * 20)
    service.http.delete(f"{AGENTS}/a")
    assert cached(say(service, "b", "hello " * 20)) > 100


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_an_agent_is_deleted_while_it_replies(service: Service, runtime: FakeRuntime) -> None:
    assert isinstance(runtime, GatedRuntime)
    answers: list[Any] = []
    talking = threading.Thread(
        target=lambda: answers.append(service.chat("hello " * 20, prompt_cache_key="a", max_tokens=500))
    )
    talking.start()
    assert runtime.started.acquire(timeout=WAIT_S)
    runtime.allow.release(3)
    for _ in range(3):
        assert runtime.started.acquire(timeout=WAIT_S)
    refused: list[Any] = []
    deleting = threading.Thread(target=lambda: refused.append(service.http.delete(f"{AGENTS}/a")))
    deleting.start()
    runtime.step_until_ended(deleting)
    runtime.run_freely()
    talking.join(WAIT_S)
    assert refused[0].status_code == 200
    assert code(answers[0]) == (404, "agent_not_found")
    service.store.flush()
    assert service.http.get(AGENTS).json()["data"] == []
    assert cached(service.chat("hello " * 20).json()) == 0
    assert service.store.stats().num_blocks <= len("user: \nassistant: " + "hello " * 20) // 16 + 1


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_a_replying_agent_is_forked_but_not_rolled_back(service: Service, runtime: FakeRuntime) -> None:
    assert isinstance(runtime, GatedRuntime)
    runtime.allow.release(20)
    say(service, "a", "hello")
    service.http.post(f"{AGENTS}/a/checkpoints", json={"name": "t"})
    while runtime.allow.acquire(blocking=False):
        pass
    while runtime.started.acquire(blocking=False):
        pass
    talking = threading.Thread(target=lambda: service.chat("hello", prompt_cache_key="a", max_tokens=400))
    talking.start()
    assert runtime.started.acquire(timeout=WAIT_S)
    fork = service.http.post(f"{AGENTS}/a/fork", json={"name": "b"})
    assert fork.status_code == 201
    results: list[Any] = []
    asking = threading.Thread(
        target=lambda: results.append(service.http.post(f"{AGENTS}/a/rollback", json={"checkpoint": "t"}))
    )
    asking.start()
    while not results:
        runtime.allow.release(1)
        asking.join(0.05)
    assert code(results[0]) == (409, "agent_busy")
    runtime.run_freely()
    talking.join(WAIT_S)


def test_an_agent_leaves_as_a_file_and_comes_back(service: Service, tmp_path: Path) -> None:
    first = say(service, "a/b", "hello " * 20)
    service.http.post(f"{AGENTS}/a/b/checkpoints", json={"name": "t"})
    answer = service.http.get(f"{AGENTS}/a/b/export")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "a%2Fb.agent.safetensors" in answer.headers["content-disposition"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    body = answer.content
    taken = service.http.post(f"{AGENTS}/import", content=body)
    assert code(taken) == (409, "agent_exists")
    service.http.delete(f"{AGENTS}/a/b")
    back = service.http.post(f"{AGENTS}/import", params={"name": "c"}, content=body)
    assert (back.status_code, back.json()["id"], back.json()["checkpoints"]) == (201, "c", 1)
    assert back.json()["durable_tokens"] == back.json()["tokens"] - 1
    again = say(service, "c", "hello " * 20)
    assert again["choices"] == first["choices"]
    assert cached(again) == again["usage"]["prompt_tokens"] - 1, "nothing is computed twice"
    assert service.http.post(f"{AGENTS}/import", params={"overwrite": True}, content=body).status_code == 201
    assert code(service.http.get(f"{AGENTS}/nobody/export")) == (404, "agent_not_found")
    names = {path.name for path in (tmp_path / "data").iterdir() if path.is_file()}
    assert names <= {"store.lock", "catalog.sqlite", "catalog.sqlite-wal"}, "uploads leave nothing behind"


def test_an_export_that_cannot_be_finished_is_cut_and_said_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    say(service, "a", "hello " * 20)
    for file in (service.store_folder / "blocks").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
        service.http.get(f"{AGENTS}/a/export")
    assert service.http.get("/health").status_code == 200
    said = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [record.exc_info for record in said] == [None]
    assert "export of 'a' was cut" in said[0].message


def test_uploads_have_a_bound_of_their_own(service: Service) -> None:
    large = b"x" * 200_000
    assert code(service.http.post(f"{AGENTS}/import", content=large)) == (400, "archive_invalid")
    other = service.http.post(AGENTS, content=large, headers={"content-type": "application/json"})
    assert other.status_code == 413
    url = service.http.base_url
    declared = http.client.HTTPConnection(url.host, url.port, timeout=WAIT_S)
    declared.putrequest("POST", f"{AGENTS}/import")
    declared.putheader("content-length", str(service.store.quota_nbytes + 1))
    declared.endheaders()
    assert declared.getresponse().status == 413
    declared.close()


def test_an_upload_that_stalls_holds_up_nobody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_files, "UPLOAD_IDLE_S", 0.5)
    say(service, "a", "hello")
    body = service.http.get(f"{AGENTS}/a/export").content
    url = service.http.base_url
    stalling = http.client.HTTPConnection(url.host, url.port, timeout=WAIT_S)
    stalling.putrequest("POST", f"{AGENTS}/import")
    stalling.putheader("content-length", str(len(body)))
    stalling.endheaders(body[:100])
    taken = service.http.post(f"{AGENTS}/import", params={"name": "b"}, content=body)
    assert taken.status_code == 201
    answer = stalling.getresponse()
    assert (answer.status, json.load(answer)["error"]["code"]) == (408, "upload_stalled")
    stalling.close()


def test_an_archive_of_another_model_is_refused(service: Service) -> None:
    say(service, "a", "hello")
    body = service.http.get(f"{AGENTS}/a/export").content
    foreign = body.replace(b"fake-1", b"fake-2")
    assert foreign != body
    answer = service.http.post(f"{AGENTS}/import", params={"name": "b"}, content=foreign)
    assert answer.status_code in (400, 409)
    assert [row["id"] for row in service.http.get(AGENTS).json()["data"]] == ["a"]
