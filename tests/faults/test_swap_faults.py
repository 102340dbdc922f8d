"""Memory that runs out while models are swapped: the old one is back, or the server says that none is."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.faults.faulty import WAIT_S, FaultyRuntime, Site, code_of, text_of
from tests.models.fake_loader import NEEDED_NBYTES, FakeLoader

from dormouse.api.app import create_app
from dormouse.api.server import Server, bind
from dormouse.models.aliases import Aliases
from dormouse.models.host import HostOptions, ModelHost
from dormouse.store.block_store import BlockStore

PROMPT = "a talk that is long enough to fill several blocks of sixteen tokens each, and is told again"


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[FakeLoader]:
    with BlockStore.open(tmp_path / "data", quota_nbytes=1 << 30) as store:
        yield FakeLoader(store)


@pytest.fixture
def swapping(loader: FakeLoader, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Site]:
    """A server that serves `a` and can swap."""
    caplog.set_level(logging.INFO)
    store = loader._store
    served = loader.load(loader.find("a"))
    host = ModelHost(served, loader, HostOptions(aliases=Aliases(("fake",))))
    listener = bind("127.0.0.1", 0)
    ready: queue.SimpleQueue[str] = queue.SimpleQueue()
    server = Server(create_app(host, store, max_body_nbytes=100_000), host, grace_s=0, on_ready=ready.put)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        url = ready.get(timeout=WAIT_S)
        with httpx.Client(base_url=url, timeout=WAIT_S) as http:
            runtime = FaultyRuntime(served.engine.runtime)
            yield Site(url, http, runtime, served.engine, store, tmp_path / "data", caplog)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listener.close()
        host.close()


def swap(site: Site, model: str) -> httpx.Response:
    return site.http.post("/admin/models/swap", json={"model": model, "timeout_s": 5})


@pytest.mark.parametrize("free", [10 * NEEDED_NBYTES, NEEDED_NBYTES // 2], ids=["beside", "in turn"])
def test_a_swap_without_memory_brings_the_old_model_back(
    swapping: Site, loader: FakeLoader, free: int
) -> None:
    said = text_of(swapping.chat(PROMPT, agent="ada"))
    loader.free = free
    loader.failing.add("b")
    answer = swap(swapping, "b")
    assert (answer.status_code, code_of(answer)) == (500, "swap_failed")
    assert "no room for b" in answer.text
    assert (swapping.status(), swapping.reasons()) == ("ok", set())
    assert swapping.metric("dormouse_swaps_total") == 1
    assert swapping.metric("dormouse_swaps_total", outcome="done") == 0
    assert swapping.logged(logging.ERROR, "'b' could not be loaded")
    again = swapping.chat(PROMPT, agent="ada")
    assert text_of(again) == said
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    loader.failing.clear()
    assert swap(swapping, "b").status_code == 200


def test_no_memory_for_either_model_is_told_and_mended_by_a_swap(swapping: Site, loader: FakeLoader) -> None:
    said = text_of(swapping.chat(PROMPT, agent="ada"))
    loader.free = NEEDED_NBYTES // 2
    loader.failing |= {"a", "b"}
    answer = swap(swapping, "b")
    assert (answer.status_code, code_of(answer)) == (500, "swap_failed")
    assert "no model is served" in answer.text
    assert swapping.status() == "dead"
    assert "no_model" in swapping.reasons()
    refused = swapping.chat(PROMPT)
    assert refused.status_code == 503
    assert "restart" in refused.text
    assert swapping.logged(logging.ERROR, "'a' could not be loaded again")
    loader.failing.clear()
    assert swap(swapping, "a").status_code == 200
    assert (swapping.status(), swapping.reasons()) == ("ok", set())
    assert text_of(swapping.chat(PROMPT, agent="ada")) == said


def test_health_answers_while_a_load_hangs(swapping: Site, loader: FakeLoader) -> None:
    """Loading beside the old model, for however long: it serves on, and health says what is going on."""
    loader.gate.clear()
    thread = threading.Thread(target=swap, args=(swapping, "b"))
    thread.start()
    try:
        for _ in range(2):  # the first load was that of `a`
            assert loader.loading.acquire(timeout=WAIT_S)
        assert (swapping.status(), swapping.reasons()) == ("degraded", {"swapping"})
        assert swapping.chat(PROMPT).status_code == 200
    finally:
        loader.gate.set()
        thread.join(WAIT_S)
    swapping.until_well()
