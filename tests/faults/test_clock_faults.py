"""Clocks that jump: what is measured is measured by the monotonic clock."""

from __future__ import annotations

import ast
import itertools
import logging
import time
from pathlib import Path

import pytest
from tests.faults.conftest import Serve
from tests.faults.faulty import text_of

import dormouse
from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.rate_limits import RateLimits

YEAR_S = 365 * 86400.0

SHOWN_ONLY = {
    "api/keys.py": "when a key was made, revoked, last used",
    "api/openai_objects.py": "`created` of a reply",
    "api/responses_stream.py": "`created_at` and `completed_at` of a response",
    "models/decisions.py": "when an agent was last looked for",
    "models/stack.py": "`created` of the model",
    "store/block_store.py": "which block was used last, also before a restart; by a clock that is passed in",
    "store/catalog.py": "when a migration ran",
    "store/clock.py": "when something was used; never earlier than before",
    "store/conversion.py": "when what is converted was used, which it keeps",
    "api/tracing.py": "when a span began, for a collector",
    "store/block_files.py": "the name of a file in quarantine",
    "bench/machine.py": "when a measurement was taken",
}
"""Who may ask for the time of day, and what for: nothing that somebody waits for."""


def test_nobody_waits_by_the_time_of_day() -> None:
    root = Path(dormouse.__file__).parent
    asking = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in {
                ("time", "time"),
                ("time", "time_ns"),
                ("datetime", "now"),
                ("datetime.datetime", "now"),
                ("datetime", "utcnow"),
            }:
                asking.add(path.relative_to(root).as_posix())
    assert asking == set(SHOWN_ONLY)


def test_a_clock_that_jumps_stops_nobody(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year ahead, a year back, at every look: no deadline passes, no limit is hit, nothing is lost."""
    real = time.time
    jumps = itertools.cycle([0.0, YEAR_S, -YEAR_S])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    (tmp_path / "data").mkdir(mode=0o700)
    key = KeyFile(tmp_path / "data").add("acme", is_admin=True)
    ring = KeyRing(tmp_path / "data", clock=lambda: real() + next(jumps))
    site = serve(
        clock=lambda: real() + next(jumps),
        around=Edge(keys=ring, limits=RateLimits(requests_per_minute=1000)),
    )
    site.http.headers["x-api-key"] = key
    prompt = "a talk that is long enough to fill several blocks of sixteen tokens"
    first = text_of(site.chat(prompt, agent="ada"))
    for _ in range(4):
        assert text_of(site.chat(prompt, agent="ada")) == first
    assert site.store.flush()
    assert site.http.post("/v1/agents/ada/sleep").status_code == 200
    answer = site.chat(prompt, agent="ada")
    assert text_of(answer) == first
    assert answer.json()["usage"]["prompt_tokens_details"]["disk_tokens"] > 0
    assert site.metric("dormouse_rate_limited_total") == 0
    assert site.metric("dormouse_queue_seconds_sum") < 60
    assert (site.status(), site.reasons()) == ("ok", set())
    assert not any(record.levelno >= logging.ERROR for record in site.log.records)
