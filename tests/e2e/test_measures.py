"""The measuring commands on the real model, as small as they go: their shape, not their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dormouse.cli.main import app

pytestmark = [pytest.mark.usefixtures("smollm2"), pytest.mark.timeout(300)]


def measure(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_bench_prefill() -> None:
    row = measure("bench", "prefill", "--tokens", "64", "--repeat", "2")
    assert row["tokens_per_s"] > 0
    assert row["machine"]["cores"]


def test_bench_decode() -> None:
    row = measure("bench", "decode", "--batch", "1,3", "--context", "8", "--tokens", "6", "--repeat", "1")
    assert set(row["tokens_per_s"]) == {"1", "3"}


def test_bench_edit_quotes_and_says_the_same() -> None:
    row = measure("bench", "edit", "--tokens", "40", "--repeat", "1")
    assert row["edit"]["accepted"] > 20
    assert row["story"]["accepted"] <= row["story"]["drafted"] < 40


def test_bench_wake_restarts_for_real() -> None:
    row = measure("bench", "wake", "--context", "300", "--repeat", "1")
    assert {"cold_ttft_ms", "wake_ttft_ms", "wake_cold_cache_ttft_ms", "ratio"} <= row.keys()
    assert row["stream_longest_gap_ms"] >= 0 < row["stream_usual_step_ms"]
    assert len(row["runs"]) == 1
    assert row["recomputed_tokens"] <= 1
    assert row["same_token"]


def test_bench_wake_says_why_it_cannot() -> None:
    refused = CliRunner().invoke(app, ["bench", "wake", "--context", "100000", "--repeat", "1"])
    assert refused.exit_code == 1
    assert "too long" in refused.output
    assert "Traceback" not in refused.output


def test_quality_tells_formats_apart(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog near the river. " * 12)
    row = measure("quality", str(text), "--formats", "bf16,q4", "--window", "64")
    best, worst = row["formats"]
    assert (best["format"], best["against_first"]) == ("bf16", "+0.00%")
    assert best["bytes_per_token"] > 3 * worst["bytes_per_token"]
    assert 1 < best["perplexity"] < 100
