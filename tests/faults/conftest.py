"""A server that can be made to fail, and the report of what was run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.faults.faulty import Site, serving

from dormouse.bench import machine

Serve = Callable[..., Site]
"""The fixture `serve`: what `serving` takes by name; ended with the test."""


@pytest.fixture
def serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Serve]:
    with ExitStack() as running:
        yield lambda **options: running.enter_context(serving(tmp_path, caplog, **options))


@pytest.fixture
def site(serve: Serve) -> Site:
    return serve()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --faults-json, write what was run here, when, on what, and how it ended."""
    path = config.getoption("--faults-json")
    if path is None:
        return
    rows = [
        {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/faults/")
        # One row a test: its own run, or what kept it from running.
        if report.when == "call" or report.outcome != "passed"
    ]
    document = {"on": machine.describe(), "tests": sorted(rows, key=lambda row: str(row["test"]))}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
