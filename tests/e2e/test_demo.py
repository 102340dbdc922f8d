"""`make demo`, small: the table, the chart, and equal replies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(660)
@pytest.mark.usefixtures("smollm2")
def test_the_demo_keeps_its_word(tmp_path: Path) -> None:
    flags = ["--agents", "2", "--context", "600", "--reply", "8", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.demo", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL" in done.stdout
    rows = json.loads((tmp_path / "demo.json").read_text())["agents"]
    assert all(row["same_reply"] for row in rows)
    assert all(row["prompt_tokens"] - row["cached_tokens"] < 64 for row in rows)
    assert (tmp_path / "demo.png").stat().st_size > 5_000
