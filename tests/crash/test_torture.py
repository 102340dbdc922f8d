"""A few cycles of `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash.servers import FAKE, REAL
from tests.crash.torture import torture

from dormouse.models.folder import ModelFolder

pytestmark = pytest.mark.timeout(600)


def test_agents_outlive_their_servers(tmp_path: Path) -> None:
    row = torture(FAKE, 6, 1, tmp_path)
    assert row["cycles"] == 6
    assert row["replies_compared"] > 0
    assert row["blocks_verified"] > 0


def test_agents_of_the_real_model_outlive_their_servers(tmp_path: Path, smollm2: ModelFolder) -> None:
    assert smollm2.path.exists()
    row = torture(REAL, 2, 1, tmp_path)
    assert row["cycles"] == 2
    assert row["replies_compared"] > 0
