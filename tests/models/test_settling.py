"""The collector leaves alone what start-up made, until the server is closed."""

from __future__ import annotations

import gc

from dormouse.models.settling import settle, unsettle


def test_what_is_there_is_kept_from_the_collector_until_the_end() -> None:
    before = gc.get_freeze_count()
    settle()
    try:
        assert gc.get_freeze_count() > before
    finally:
        unsettle()
    assert gc.get_freeze_count() == 0
