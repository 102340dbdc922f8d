"""The machine's clock is set by years while the server runs: limits, deadlines and leases do not notice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.api.conftest import serving

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.rate_limits import RateLimits
from dormouse.runtimes.fake import FakeRuntime

YEARS = 5 * 365 * 86400.0


@pytest.mark.parametrize("jump_s", [YEARS, -YEARS])
def test_limits_and_deadlines_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    edge = Edge(limits=RateLimits(requests_per_minute=2))
    with serving(tmp_path, FakeRuntime(64), edge) as service:
        first = service.chat("hello")
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        assert service.chat("hello").json()["choices"] == first.json()["choices"]
        refused = service.chat("hello")
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 60
        health = service.http.get("/health").json()
        assert {reason["code"] for reason in health["reasons"]} <= {"disk_low"}


def test_the_last_use_of_a_key_is_noted_after_the_clock_was_set_back(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    key = KeyFile(tmp_path).add("acme")
    ring = KeyRing(tmp_path, clock=lambda: now[0])
    assert ring.find(key) is not None
    now[0] -= YEARS
    assert ring.find(key) is not None
    (known,) = KeyFile(tmp_path).all()
    assert known.used_at == now[0]
