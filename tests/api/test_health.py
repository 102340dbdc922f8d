"""Each reason that `/health` gives, brought about."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.api.conftest import Service
from tests.engine.harness import WAIT_S, GatedRuntime

from dormouse.api import health

pytestmark = pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)


@pytest.fixture
def gated(runtime: GatedRuntime) -> Iterator[GatedRuntime]:
    yield runtime
    runtime.run_freely()


def reasons(service: Service) -> set[str]:
    return {reason["code"] for reason in service.http.get("/health").json()["reasons"]}


def probes(service: Service) -> dict[str, int]:
    return {name: service.http.get(f"/health/{name}").status_code for name in ("live", "ready", "startup")}


GOOD = {"live": 200, "ready": 200, "startup": 200}


def test_all_is_well(service: Service, gated: GatedRuntime) -> None:
    gated.run_freely()
    assert service.chat().status_code == 200
    assert reasons(service) == set()
    assert probes(service) == GOOD


def test_an_arena_that_is_nearly_full(service: Service, gated: GatedRuntime) -> None:
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(service.chat, "x" * 920)
        assert gated.started.acquire(timeout=WAIT_S)
        assert reasons(service) == {"arena_full"}
        assert service.http.get("/health").json()["status"] == "degraded"
        assert probes(service) == GOOD
        gated.run_freely()
        assert reply.result().status_code == 200
    assert reasons(service) == set()


def test_a_queue_that_is_nearly_full(service: Service, gated: GatedRuntime) -> None:
    with ThreadPoolExecutor(4) as threads:
        replies = [threads.submit(service.chat, f"hello {number}") for number in range(4)]
        assert gated.started.acquire(timeout=WAIT_S)
        while service.served.engine.num_open < 4:
            assert service.http.get("/").status_code == 200
        assert reasons(service) == {"queue_nearly_full"}
        gated.run_freely()
        assert {reply.result().status_code for reply in replies} == {200}


def test_a_step_that_does_not_end(
    service: Service, gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_STALLED_S", 0.0)
    assert reasons(service) == set(), "an engine that waits for requests is not stalled"
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(service.chat)
        assert gated.started.acquire(timeout=WAIT_S)
        assert reasons(service) == {"engine_stalled"}
        assert probes(service) == {"live": 200, "ready": 503, "startup": 200}
        gated.run_freely()
        assert reply.result().status_code == 200


def test_a_disk_that_is_nearly_full(
    service: Service, gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.run_freely()
    monkeypatch.setattr(health, "_DISK_FLOOR_NBYTES", 1 << 60)
    assert reasons(service) == {"disk_low"}
    assert probes(service) == GOOD


def test_an_engine_that_ends(service: Service, gated: GatedRuntime) -> None:
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(service.chat)
        assert gated.started.acquire(timeout=WAIT_S)
        stopper = threading.Thread(target=service.served.engine.stop, args=(WAIT_S,))
        stopper.start()
        while not service.served.engine.is_stopping:
            assert service.http.get("/").status_code == 200
        assert service.http.get("/health").status_code == 503
        assert service.http.get("/health").json()["status"] == "draining"
        assert probes(service) == {"live": 200, "ready": 503, "startup": 200}
        gated.run_freely()
        assert reply.result().status_code == 200
        stopper.join(WAIT_S)
