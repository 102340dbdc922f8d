"""Rate limits: the buckets, and what a client sees of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.conftest import Service, serving

from dormouse.api.caller import Caller
from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.rate_limits import MAX_BUCKETS, Buckets, Limit, RateLimits
from dormouse.domain.errors import RateLimited
from dormouse.runtimes.fake import FakeRuntime


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limited(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Service]:
    """A server with keys and the limits that a test names."""
    (tmp_path / "data").mkdir()
    edge = Edge(keys=KeyRing(tmp_path / "data"), limits=RateLimits(**request.param, clock=clock))
    with serving(tmp_path, FakeRuntime(64), edge) as service:
        yield service


def test_a_bucket_holds_a_minute_and_fills_with_time(clock: Clock) -> None:
    buckets = Buckets(6, clock)
    for _ in range(6):
        assert buckets.wait_s("a", 1) == 0
        buckets.take("a", 1)
    assert buckets.wait_s("a", 1) == pytest.approx(10)
    assert buckets.wait_s("b", 1) == 0
    clock.now = 9.5
    assert buckets.wait_s("a", 1) == pytest.approx(0.5)
    clock.now = 10.0
    assert buckets.wait_s("a", 1) == 0
    clock.now = 1e6
    assert buckets.wait_s("a", 7) == pytest.approx(10), "a full bucket takes no more"


def test_what_is_owed_has_to_fill_up(clock: Clock) -> None:
    buckets = Buckets(60, clock)
    buckets.take("a", 180)
    assert buckets.wait_s("a", 1) == pytest.approx(121)


def test_names_are_bounded_and_the_longest_unused_goes(clock: Clock) -> None:
    buckets = Buckets(60, clock)
    buckets.take("old", 60)
    buckets.take("new", 60)
    for name in range(MAX_BUCKETS - 1):
        buckets.take(name, 1)
    assert len(buckets) == MAX_BUCKETS
    assert buckets.wait_s("new", 1) == pytest.approx(1)
    assert buckets.wait_s("old", 1) == 0
    assert len(buckets) == MAX_BUCKETS


def test_tokens_are_owed_after_the_fact(clock: Clock) -> None:
    limits, caller = RateLimits(tokens_per_minute=60, clock=clock), Caller(key="k")
    limits.admit_request(caller)
    limits.spend_tokens(caller, 89)
    with pytest.raises(RateLimited) as refused:
        limits.admit_request(caller)
    assert refused.value.retry_after_s == 30
    limits.admit_request(Caller(key="other"))
    clock.now = 30.0
    limits.admit_request(caller)
    assert limits.refused == {Limit.KEY_REQUESTS: 0, Limit.KEY_TOKENS: 1, Limit.AGENT_REQUESTS: 0}


@pytest.mark.parametrize("limited", [{"requests_per_minute": 2}], indirect=True)
def test_a_key_that_asks_too_often_gets_429_in_its_dialect(limited: Service, clock: Clock) -> None:
    file = KeyFile(limited.store_folder)
    key, other = file.add("a"), file.add("a")
    limited.http.headers["x-api-key"] = key
    assert [limited.chat().status_code for _ in range(2)] == [200, 200]
    clock.now = 0.5
    refused = limited.chat()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "30", "whole seconds, rounded up"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    refused = limited.http.post("/v1/messages", json={})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert limited.http.get("/health").status_code == 200
    limited.http.headers["x-api-key"] = other
    assert limited.chat().status_code == 200
    limited.http.headers["x-api-key"] = key
    clock.now = 30.0
    assert limited.chat().status_code == 200


@pytest.mark.parametrize("limited", [{"agent_requests_per_minute": 1}], indirect=True)
def test_an_agent_that_asks_too_often_gets_429(limited: Service, clock: Clock) -> None:
    assert limited.chat(prompt_cache_key="a").status_code == 200
    refused = limited.chat(prompt_cache_key="a")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert "agent" in refused.json()["error"]["message"]
    assert limited.chat(prompt_cache_key="b").status_code == 200
    assert limited.chat().status_code == 200
    limited.http.headers["x-api-key"] = KeyFile(limited.store_folder).add("other-tenant")
    assert limited.chat(prompt_cache_key="a").status_code == 200, "names of another tenant are other agents"
    clock.now = 60.0
    assert limited.chat(prompt_cache_key="a").status_code == 200


@pytest.mark.parametrize("limited", [{"tokens_per_minute": 60}], indirect=True)
def test_found_tokens_are_free(limited: Service, clock: Clock) -> None:
    text = "a conversation that is longer than three blocks of sixteen tokens"
    assert limited.chat(text).status_code == 200
    refused = limited.chat(text)
    assert refused.status_code == 429
    clock.now = 60.0
    assert limited.chat(text).status_code == 200
    assert limited.chat(text).status_code == 200, "the prompt was found: it took 9 tokens"


@pytest.mark.parametrize("limited", [{"requests_per_minute": 1}], indirect=True)
def test_what_has_no_key_uses_up_nothing(limited: Service) -> None:
    key = KeyFile(limited.store_folder).add("a")
    assert [limited.chat().status_code for _ in range(3)] == [401] * 3
    limited.http.headers["x-api-key"] = key
    assert limited.chat().status_code == 200
