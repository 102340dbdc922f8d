"""The admin routes over models that swap."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from tests.api.conftest import running
from tests.engine.harness import WAIT_S
from tests.models.fake_loader import NEEDED_NBYTES, FakeLoader
from typer.testing import CliRunner

from dormouse.api.app import create_app
from dormouse.api.caller import Caller, caller_of
from dormouse.cli.main import app as commands
from dormouse.models.aliases import Aliases
from dormouse.models.host import HostOptions, ModelHost
from dormouse.store.block_store import BlockStore


@dataclass
class Site:
    """A server that can serve `a`, `b` and `c`, and starts with `a`."""

    app: FastAPI
    host: ModelHost
    loader: FakeLoader
    store: BlockStore
    http: httpx.Client

    @property
    def port(self) -> str:
        return str(self.http.base_url.port)

    def chat(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello " * 9}], "max_tokens": 5}
        return self.http.post("/v1/chat/completions", json=body | fields)

    def swap(self, model: str, **fields: Any) -> httpx.Response:
        return self.http.post("/admin/models/swap", json={"model": model} | fields)

    def state(self) -> dict[str, Any]:
        document: dict[str, Any] = self.http.get("/admin/state").json()
        return document


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with BlockStore.open(tmp_path, quota_nbytes=1 << 30) as store:
        loader = FakeLoader(store)
        served = loader.load(loader.find("a"))
        loader.loading.acquire()
        host = ModelHost(served, loader, HostOptions(aliases=Aliases(("any",))))
        app = create_app(host, store, max_body_nbytes=100_000)
        with running(app, host) as url, httpx.Client(base_url=url, timeout=30) as http:
            yield Site(app, host, loader, store, http)
        host.close()


def test_models_of_the_machine(site: Site) -> None:
    models = site.http.get("/admin/models").json()["data"]
    assert {model["id"]: model["served"] for model in models} == {
        "a": True,
        "b": False,
        "c": False,
        "odd": False,
    }


def test_a_swap_over_http(site: Site) -> None:
    assert site.chat("any", prompt_cache_key="ada").json()["model"] == "a"
    result = site.swap("b").json()
    assert (result["model"], result["from"], result["to"], result["phase"]) == ("b", "a", "b", "done")
    assert result["beside"]
    assert set(result["phases"]) == {"checking", "loading", "draining", "unloading"}
    assert site.chat("any").json()["model"] == "b"
    assert site.chat("a").status_code == 404
    assert site.http.get("/v1/agents/ada").json()["state"] == "asleep"
    assert site.swap("a").status_code == 200
    usage = site.chat("a", prompt_cache_key="ada").json()["usage"]
    assert usage["prompt_tokens_details"]["disk_tokens"] == usage["prompt_tokens"] - 1
    host = site.state()["host"]
    assert (host["model"], host["swaps"]["done"]) == ("a", 2)


def test_progress_is_seen_and_a_second_swap_waits_its_turn(site: Site) -> None:
    site.loader.free = NEEDED_NBYTES // 2
    site.loader.gate.clear()
    with ThreadPoolExecutor(2) as threads:
        swap = threads.submit(site.swap, "b")
        assert site.loader.loading.acquire(timeout=WAIT_S)
        state = site.state()
        assert (state["status"], state["host"]["change"]["phase"]) == ("degraded", "loading")
        assert state["reasons"][0]["code"] == "swapping"
        assert site.http.get("/health").status_code == 200
        assert site.http.get("/health/ready").status_code == 503
        assert site.http.get("/health/live").status_code == 200
        second = site.swap("c")
        assert (second.status_code, second.json()["error"]["code"]) == (409, "swap_in_progress")
        waiting = threads.submit(site.chat, "any")
        site.loader.gate.set()
        assert swap.result().status_code == 200
        assert waiting.result().json()["model"] == "b"
    assert site.http.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("model", "status", "code", "outcome"),
    [
        ("nowhere", 404, "model_not_found", "refused"),
        ("odd", 400, "swap_refused", "refused"),
        ("b", 500, "swap_failed", "rolled_back"),
    ],
)
def test_a_swap_that_cannot_be_says_why(site: Site, model: str, status: int, code: str, outcome: str) -> None:
    site.loader.failing = {"b"}
    answer = site.swap(model)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert site.chat("a").status_code == 200
    assert site.state()["host"]["swaps"] == {"done": 0, "refused": 0, "rolled_back": 0, "failed": 0} | {
        outcome: 1
    }
    assert f'dormouse_swaps_total{{outcome="{outcome}"}} 1.0' in site.http.get("/metrics").text


def test_no_model_at_all_is_dead_until_a_swap(site: Site) -> None:
    site.loader.free = NEEDED_NBYTES // 2
    site.loader.failing = {"a", "b"}
    assert site.swap("b").status_code == 500
    assert site.http.get("/health/live").status_code == 503
    assert site.http.get("/health").json()["reasons"][-1]["code"] == "no_model"
    refused = site.chat("a")
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    site.loader.failing = set()
    assert site.swap("a").status_code == 200
    assert site.http.get("/health").json()["status"] == "ok"
    assert site.chat("a").status_code == 200


@pytest.mark.parametrize(
    "fields", [{"timeout_s": -1}, {"timeout_s": 1e9}, {"model": ""}, {"force": True}, {"model": None}]
)
def test_a_malformed_swap_is_refused(site: Site, fields: dict[str, Any]) -> None:
    answer = site.swap(**{"model": "b", **fields})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert site.state()["host"]["change"] is None


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/models"), ("GET", "/admin/state"), ("POST", "/admin/models/swap")],
)
def test_only_admins_may_ask(site: Site, method: str, path: str) -> None:
    def nobody(request: Request) -> Caller:
        return Caller(tenant=request.url.path, key="k", is_admin=False)

    site.app.dependency_overrides[caller_of] = nobody
    answer = site.http.request(method, path, json={"model": "b"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_needed")
    assert site.host.served.name == "a"


def test_state_is_whole(site: Site) -> None:
    site.chat("a")
    state = site.state()
    assert state["version"].startswith("0.")
    assert state["uptime_s"] >= 0
    assert state["engine"]["generated_tokens"] == 5
    assert state["queue"]["open"] == 0
    assert state["store"]["quota_nbytes"] == 1 << 30
    assert state["host"]["aliases"] == ["any"]


def test_the_command_swaps(site: Site) -> None:
    result = CliRunner().invoke(commands, ["models", "swap", "b", "--port", site.port])
    assert (result.exit_code, "b is served" in result.output) == (0, True), result.output
    assert site.host.served.name == "b"
    result = CliRunner().invoke(commands, ["models", "swap", "odd", "--port", site.port])
    assert (result.exit_code, "no layers" in result.output) == (1, True), result.output
    result = CliRunner().invoke(commands, ["models", "swap", "b", "--port", "1"])
    assert (result.exit_code, "--port" in result.output) == (1, True), result.output


def test_the_front_door(site: Site) -> None:
    for path in ("/", "/api/hello"):
        head = site.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert site.http.get("/").json()["name"] == "dormouse"


def test_health_while_the_first_model_loads(tmp_path: Path) -> None:
    with BlockStore.open(tmp_path, quota_nbytes=1 << 30) as store:
        loader = FakeLoader(store)
        loader.gate.clear()
        host = ModelHost(None, loader)
        app = create_app(host, store, max_body_nbytes=100_000)
        loaded = threading.Event()

        async def load() -> None:
            await host.start("a")
            loaded.set()

        with running(app, host, load=load) as url, httpx.Client(base_url=url, timeout=30) as http:
            assert loader.loading.acquire(timeout=WAIT_S)
            assert http.get("/health/live").status_code == 200
            startup = http.get("/health/startup")
            assert (startup.status_code, startup.json()["status"]) == (503, "starting")
            assert startup.json()["reasons"][0]["message"].startswith("loading 'a'")
            assert http.get("/health/ready").status_code == 503
            assert http.get("/health").status_code == 503
            assert http.get("/admin/state").json()["engine"] is None
            assert http.get("/v1/models").status_code == 503
            loader.gate.set()
            assert loaded.wait(WAIT_S)
            assert http.get("/health/startup").status_code == 200
            assert http.get("/health/ready").status_code == 200
        host.close()
