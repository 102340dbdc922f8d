"""Every metric moves when what it counts happens, and is documented."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.conftest import Service, serving
from tests.api.test_admin import Site, site
from tests.engine.harness import WAIT_S, GatedRuntime
from tests.engine.test_speculation import QuotingRuntime
from tests.models.fake_loader import FakeLoader

from dormouse.api.edge import Edge
from dormouse.api.metric_table import METRICS
from dormouse.api.metrics import Metrics
from dormouse.api.rate_limits import RateLimits
from dormouse.api.services import Services
from dormouse.models.host import ModelHost
from dormouse.models.reply_memory import ReplyMemory
from dormouse.runtimes.fake import FakeRuntime
from dormouse.store.block_store import BlockStore

__all__ = ["site"]  # a fixture

Values = dict[tuple[str, tuple[str, ...]], float]
"""By name and values of the labels, these in the order of the labels' names."""


def scrape(service: Service | Site, accept: str = "") -> Values:
    answer = service.http.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def grown(before: Values, after: Values) -> set[str]:
    """Names of what went up, histograms by their count."""
    return {
        name.removesuffix("_count")
        for (name, labels), value in after.items()
        if value > before.get((name, labels), 0.0) and not name.endswith(("_bucket", "_sum", "_created"))
    }


@pytest.fixture
def service(tmp_path: Path, runtime: FakeRuntime) -> Iterator[Service]:
    edge = Edge(limits=RateLimits(agent_requests_per_minute=2))
    with serving(tmp_path, runtime, edge) as service:
        yield service


def damage(folder: Path) -> None:
    for path in (folder / "blocks").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_a_request_moves_tokens_times_and_counts(service: Service) -> None:
    before = scrape(service)
    service.chat("a conversation that fills some blocks of sixteen tokens", prompt_cache_key="me")
    service.store.flush()
    after = scrape(service)
    moved = grown(before, after)
    assert "dormouse_wake_seconds" not in moved
    assert moved >= {
        "dormouse_tokens_total",
        "dormouse_pages",
        "dormouse_store_bytes",
        "dormouse_store_blocks",
        "dormouse_store_agents",
        "dormouse_store_written_bytes_total",
        "dormouse_requests_total",
        "dormouse_replies_total",
        "dormouse_request_seconds",
        "dormouse_queue_seconds",
        "dormouse_prefill_seconds",
        "dormouse_decode_seconds",
        "dormouse_time_to_first_token_seconds",
        "dormouse_inter_token_seconds",
    }
    assert after["dormouse_tokens_total", ("generated",)] == 8
    assert after["dormouse_requests_total", ("openai", "POST", "/v1/chat/completions", "200")] == 1
    assert after["dormouse_replies_total", ("length",)] == 1
    assert after["dormouse_pages", ("idle",)] + after["dormouse_pages", ("free",)] == 64
    assert after["dormouse_store_bytes", ("blocks",)] > 0
    assert after["dormouse_store_quota_bytes", ()] == 1 << 30


def test_each_of_several_answers_counts(service: Service) -> None:
    service.chat(n=3, temperature=1)
    values = scrape(service)
    assert values["dormouse_replies_total", ("length",)] == 3
    assert values["dormouse_decode_seconds_count", ()] == 3
    assert values["dormouse_time_to_first_token_seconds_count", ()] == 1


def test_tokens_by_source(tmp_path: Path) -> None:
    text = "a conversation that fills some blocks of sixteen tokens"
    with serving(tmp_path, FakeRuntime(64)) as service:
        cold = service.chat(text).json()["usage"]["prompt_tokens"]
        service.chat(text)
        values = scrape(service)
        assert values["dormouse_tokens_total", ("memory",)] == cold - 1
        assert values["dormouse_tokens_total", ("disk",)] == 0
        assert "dormouse_wake_seconds" not in grown({}, values)
        service.store.flush()
    with serving(tmp_path, FakeRuntime(64)) as service:
        service.chat(text)
        values = scrape(service)
    assert values["dormouse_tokens_total", ("disk",)] >= 48
    assert values["dormouse_wake_seconds_count", ()] == 1
    assert values["dormouse_wake_seconds_sum", ()] > 0
    assert values["dormouse_store_read_bytes_total", ()] > 0


def test_a_damaged_block_is_counted(tmp_path: Path) -> None:
    text = "a conversation that fills some blocks of sixteen tokens"
    with serving(tmp_path, FakeRuntime(64)) as service:
        service.chat(text)
        service.store.flush()
    damage(tmp_path / "data")
    with serving(tmp_path, FakeRuntime(64)) as service:
        service.chat(text)
        service.store.flush()
        values = scrape(service)
    assert values["dormouse_store_quarantined_blocks_total", ()] >= 1
    assert values["dormouse_store_bytes", ("quarantine",)] > 0


@pytest.mark.parametrize("runtime", [QuotingRuntime], indirect=True)
def test_guesses_are_counted(service: Service) -> None:
    service.chat("abcdefgh abcdefgh abcdefgh abc", max_tokens=120)
    values = scrape(service)
    assert values["dormouse_drafted_tokens_total", ()] >= values["dormouse_accepted_tokens_total", ()] > 0


def test_refusals_are_counted(service: Service) -> None:
    for _ in range(3):
        service.chat(prompt_cache_key="a")
    values = scrape(service)
    assert values["dormouse_rate_limited_total", ("agent_requests",)] == 1
    assert values["dormouse_rate_limited_total", ("key_requests",)] == 0
    assert values["dormouse_requests_total", ("openai", "POST", "/v1/chat/completions", "429")] == 1


def test_swaps_are_counted(site: Site) -> None:
    assert site.swap("b").status_code == 200
    assert site.swap("a").status_code == 200
    assert site.swap("odd").status_code == 400
    values = scrape(site)
    swapped = {labels[0]: value for (name, labels), value in values.items() if name == "dormouse_swaps_total"}
    assert swapped == {"done": 2, "refused": 1, "rolled_back": 0, "failed": 0}
    assert values["dormouse_swap_seconds_total", ()] > 0


def test_before_the_first_model_there_is_no_engine_to_ask(tmp_path: Path) -> None:
    with BlockStore.open(tmp_path, quota_nbytes=1 << 30) as store:
        services = Services(ModelHost(None, FakeLoader(store)), store, ReplyMemory(store))
        registry = Metrics(services, RateLimits()).registry
        assert registry.get_sample_value("dormouse_swaps_total", {"outcome": "done"}) == 0
        assert registry.get_sample_value("dormouse_preemptions_total") is None


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_what_runs_and_waits_and_goes_away(service: Service, runtime: FakeRuntime) -> None:
    assert isinstance(runtime, GatedRuntime)
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    streams = [service.http.stream("POST", "/v1/chat/completions", json=body) for _ in range(3)]
    answers = [stream.__enter__() for stream in streams]
    try:
        assert runtime.started.acquire(timeout=WAIT_S)
        runtime.allow.release()
        assert runtime.started.acquire(timeout=WAIT_S)  # the second step: all three are in
        values = scrape(service)
        assert values["dormouse_sequences", ("running",)] == 2
        assert values["dormouse_sequences", ("waiting",)] == 1
        assert values["dormouse_pages", ("used",)] >= 2
    finally:
        for answer in answers:
            answer.close()
        runtime.run_freely()
        for stream in streams:
            stream.__exit__(None, None, None)
    deadline = time.monotonic() + WAIT_S
    while scrape(service).get(("dormouse_replies_total", ("aborted",))) != 3:
        assert time.monotonic() < deadline


def test_preemptions_are_counted(tmp_path: Path) -> None:
    gated = GatedRuntime(8)
    with serving(tmp_path, gated) as service:
        body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with (
            service.http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 80}) as first,
            service.http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 80}) as second,
        ):
            gated.run_freely()
            assert first.read()
            assert second.read()
        assert scrape(service)["dormouse_preemptions_total", ()] >= 1


def test_blocks_that_do_not_reach_the_disk_are_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scrape(service)
    # That the store counts them is shown by its own tests; here, that its counts are what is shown.
    store, engine = service.store.stats(), service.served.engine.stats()
    counts = store.counts | {"evictions": 3, "failed_writes": 4, "refused_puts": 5}
    store = dataclasses.replace(store, counts=counts, pending_nbytes=7)
    engine = dataclasses.replace(engine, num_loading=2)
    monkeypatch.setattr(type(service.store), "stats", lambda _: store)
    monkeypatch.setattr(type(service.served.engine), "stats", lambda _: engine)
    assert grown(before, scrape(service)) >= {
        "dormouse_store_evicted_blocks_total",
        "dormouse_store_failed_writes_total",
        "dormouse_store_refused_blocks_total",
        "dormouse_store_pending_bytes",
        "dormouse_loading_blocks",
    }


def test_the_runtime_is_named(service: Service) -> None:
    assert scrape(service)["dormouse_runtime_info", ("fake",)] == 1
    assert scrape(service)["dormouse_working_bytes", ()] == 0  # it computes on pages as they are
    assert service.http.get("/health").json()["runtime"] == "fake"
    (model,) = service.http.get("/v1/models").json()["data"]
    assert model["runtime"] == "fake"
    assert service.http.get("/v1/models/fake").json()["runtime"] == "fake"


def test_every_metric_is_shown_once_and_named_in_a_test(service: Service) -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    source = Path(__file__).read_text()
    assert [name for name in names if f'"{name}' not in source] == []
    text = service.http.get("/metrics").text
    # When each counter was made: the library adds it to every one.
    families = {
        family.name: family
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    assert {name.removesuffix("_total") for name in names} == families.keys()
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.text)


def test_labels_are_bounded(service: Service) -> None:
    for number in range(5):
        service.http.get(f"/nothing/{number}")
        service.http.get(f"/v1/agents/{number}")
        service.http.get(f"/v1/agents/{number}/messages")
        service.http.post(f"/v1/agents/{number}/sleep")
        service.http.get(f"/v1/agents/{number}/export")
        service.http.request(f"BREW{number}", "/v1/models")
    labels = {labels for name, labels in scrape(service) if name == "dormouse_requests_total"}
    assert labels == {
        ("none", "GET", "unmatched", "404"),
        ("agents", "GET", "/v1/agents/{name:path}", "404"),
        ("agents", "GET", "/v1/agents/{name:path}/messages", "404"),
        ("agents", "POST", "/v1/agents/{name:path}/sleep", "404"),
        ("agents", "GET", "/v1/agents/{name:path}/export", "404"),
        ("openai", "other", "/v1/models", "405"),
    }


def test_dialects_are_told_apart(service: Service) -> None:
    for path in ("/v1/messages", "/v1/responses", "/v1/agents/x", "/v1/nothing", "/"):
        service.http.get(path)
    dialects = {labels[0] for name, labels in scrape(service) if name == "dormouse_requests_total"}
    assert dialects == {"anthropic", "responses", "agents", "openai", "none"}


def test_two_applications_share_no_numbers(service: Service, tmp_path: Path) -> None:
    service.chat()
    with serving(tmp_path / "other", FakeRuntime(64)) as other:
        assert scrape(other)["dormouse_tokens_total", ("generated",)] == 0
        assert scrape(other, "application/openmetrics-text; version=1.0.0")
    assert scrape(service)["dormouse_tokens_total", ("generated",)] == 8


def test_an_engine_that_rests_is_not_busy_and_all_is_well(service: Service) -> None:
    """What these two show when something is wrong is in tests/faults."""
    text = service.http.get("/metrics").text
    assert "dormouse_engine_busy_seconds" in text
    assert "dormouse_health_reasons" in text
    names = {"dormouse_engine_busy_seconds", "dormouse_health_reasons"}
    assert names <= {metric.name for metric in METRICS}
