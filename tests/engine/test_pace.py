"""The share of prompts in a step beside streams: figures in, budgets out; no clock."""

from __future__ import annotations

import pytest

from dormouse.engine.pace import LEAST, MOST_STEPS, Pace


def test_prompts_alone_take_the_whole_budget() -> None:
    pace = Pace(512)
    pace.observe(0, 512, 0.5)
    pace.observe(3, 0, 0.01)
    assert pace.budget(0) == 512


def test_without_a_measurement_the_whole_budget_is_taken() -> None:
    pace = Pace(512)
    assert pace.budget(4) == 512
    pace.observe(4, 0, 0.01)
    assert pace.budget(4) == 512, "what a prompt token costs is not known yet"


def test_beside_streams_a_step_keeps_to_its_multiple() -> None:
    pace = Pace(512)
    pace.observe(4, 0, 0.02)
    pace.observe(0, 500, 0.25)  # 0.5 ms a token
    tokens = pace.budget(4)
    assert 0.02 + tokens * 0.0005 == pytest.approx(MOST_STEPS * 0.02, rel=0.02)


def test_the_streams_share_of_a_mixed_step_is_not_counted_as_the_prompts() -> None:
    pace = Pace(512)
    pace.observe(4, 0, 0.02)
    pace.observe(4, 100, 0.07)
    assert pace.budget(4) == int((MOST_STEPS - 1) * 0.02 / 0.0005)


def test_slow_machines_still_read_prompts() -> None:
    pace = Pace(512)
    pace.observe(1, 0, 0.001)
    pace.observe(0, 10, 10.0)
    assert pace.budget(1) == LEAST
    assert Pace(8).budget(1) == 8


def test_a_mixed_step_quicker_than_the_streams_alone_costs_something() -> None:
    pace = Pace(512)
    pace.observe(1, 0, 0.02)
    pace.observe(1, 64, 0.019)
    assert LEAST <= pace.budget(1) <= 512


def test_measurements_fade() -> None:
    pace = Pace(4096)
    pace.observe(1, 0, 0.02)
    pace.observe(0, 100, 1.0)
    slow = pace.budget(1)
    for _ in range(40):
        pace.observe(0, 100, 0.01)
    assert pace.budget(1) > slow
