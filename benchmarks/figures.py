"""A pytest plugin for tests that measure: `--scale full` makes them as large as they are meant to be, and
`--record FILE` keeps a JSON row of each, whether it passed or failed.

A test puts what it measured into the fixture `figures`; it is in the JUnit file, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dormouse.bench.machine import describe

SCALES = ("small", "full")
_MACHINE = pytest.StashKey[dict[str, Any]]()


@dataclass(frozen=True)
class Scale:
    """Small enough for every run, or as large as it is meant."""

    name: str

    def __call__(self, small: int, full: int) -> int:
        """The number for this scale."""
        return full if self.name == "full" else small


def pytest_addoption(parser: pytest.Parser) -> None:
    """Both options, for all tests."""
    parser.addoption("--scale", choices=SCALES, default="small", help="how large tests of load and cost are")
    parser.addoption("--record", type=Path, metavar="FILE", help="keep a JSON row of each test with figures")


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> Scale:
    """How large this run is."""
    return Scale(pytestconfig.getoption("--scale"))


@pytest.fixture
def figures(record_property: Callable[[str, Any], None]) -> Iterator[dict[str, Any]]:
    """What the test measured, by name; anything that JSON can hold."""
    found: dict[str, Any] = {}
    yield found
    for name, value in found.items():
        record_property(name, value)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the row when the test itself has ended, before anything is torn down."""
    report = yield
    file: Path | None = item.config.getoption("--record")
    if file is not None and call.when == "call" and isinstance(item, pytest.Function):
        found = item.funcargs.get("figures")
        if isinstance(found, dict):
            _keep(file, _row(item, report, found))
    return report


def _row(item: pytest.Item, report: pytest.TestReport, found: dict[str, Any]) -> dict[str, Any]:
    stash = item.config.stash
    if _MACHINE not in stash:
        # Once: the first row makes the tree a changed one.
        stash[_MACHINE] = describe()
    return {
        "test": item.nodeid,
        "scale": item.config.getoption("--scale"),
        "outcome": report.outcome,
        "seconds": round(report.duration, 1),
        **found,
        "machine": stash[_MACHINE] | {"time": datetime.now(UTC).isoformat(timespec="seconds")},
    }


def _keep(file: Path, row: dict[str, Any]) -> None:
    """In place of the row that the test had at this scale."""
    rows = json.loads(file.read_text()) if file.exists() else []
    others = [one for one in rows if (one["test"], one["scale"]) != (row["test"], row["scale"])]
    ordered = sorted([*others, row], key=lambda one: (one["test"], one["scale"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ordered, indent=2) + "\n")
