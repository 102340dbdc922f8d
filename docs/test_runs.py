"""The last full run of the tests, in short: what `make report ARGS="--junit build/junit.xml"` keeps of it.

`make test ARGS="--junitxml=build/junit.xml"` writes that file. Kept are counts for each file, the names of
what failed, and the figures that tests recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docs.measured import FOLDER, NotRun, document, stamp
from dormouse.bench.machine import describe

NAME = "tests"
COVERAGE = "coverage"


@dataclass(frozen=True)
class TestRun:
    """A run. `files` has counts by path, `failed` the tests as `path::name`."""

    __test__ = False

    row: dict[str, Any]

    @classmethod
    def load(cls, folder: Path = FOLDER) -> TestRun | None:
        """The last one that was kept, None if there is none."""
        try:
            return cls(document(NAME, folder))
        except NotRun:
            return None

    @property
    def when(self) -> str:
        """Day and commit."""
        return stamp(self.row["time"], self.row["machine"]["commit"])

    def counts(self, test: str) -> dict[str, int]:
        """`passed`, `failed` and `skipped` in a file or below a folder; of one test, whether it failed."""
        path, _, name = test.partition("::")
        files = [
            counts
            for file, counts in self.row["files"].items()
            if file == path or file.startswith(path.rstrip("/") + "/")
        ]
        total = {key: sum(counts[key] for counts in files) for key in ("passed", "failed", "skipped")}
        if name:
            total["failed"] = sum(failed.split("[")[0] == test for failed in self.row["failed"])
        return total


def read(junit: Path) -> dict[str, Any]:
    """The row of a junit file. Raises ParseError for what is none."""
    root = ElementTree.parse(junit).getroot()
    suite = root if root.tag == "testsuite" else next(root.iter("testsuite"))
    files: dict[str, dict[str, Any]] = {}
    failed = []
    figures: dict[str, dict[str, str]] = {}
    for case in root.iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name')}"
        counts = files.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        outcome = _outcome(case)
        counts[outcome] += 1
        counts["seconds"] = round(counts["seconds"] + float(case.get("time", 0)), 1)
        if outcome == "failed":
            failed.append(name)
        if recorded := {item.get("name", ""): item.get("value", "") for item in case.iter("property")}:
            figures[name] = recorded
    total = {key: sum(counts[key] for counts in files.values()) for key in ("passed", "failed", "skipped")}
    return {
        "time": suite.get("timestamp", ""),
        "seconds": round(float(suite.get("time", 0)), 1),
        "total": total,
        "folders": _folders(files),
        "files": dict(sorted(files.items())),
        "failed": sorted(set(failed)),
        "figures": figures,
        "machine": describe(),
    }


def _folders(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tests that passed and seconds of each folder below `tests`, by its name."""
    folders: dict[str, dict[str, Any]] = {}
    for file, counts in sorted(files.items()):
        parts = file.split("/")
        if len(parts) > 2:
            folder = folders.setdefault(parts[1], {"passed": 0, "seconds": 0.0})
            folder["passed"] += counts["passed"]
            folder["seconds"] = round(folder["seconds"] + counts["seconds"], 1)
    return folders


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def keep(junit: Path) -> dict[str, int]:
    """Make a junit file the row of the last run; its counts."""
    row = read(junit)
    (FOLDER / f"{NAME}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    total: dict[str, int] = row["total"]
    return total


def keep_coverage(report: Path, folder: Path = FOLDER) -> None:
    """Make coverage.py's JSON report a row: lines and branches that ran, in percent of those there are.

    Server processes that tests start are not looked into.
    """
    document = json.loads(report.read_text(encoding="utf-8"))
    totals = document["totals"]
    row = {
        "time": document["meta"]["timestamp"],
        "percent": round(totals["percent_covered"], 1),
        "lines_percent": round(100 * totals["covered_lines"] / totals["num_statements"], 1),
        "branches_percent": round(100 * totals["covered_branches"] / totals["num_branches"], 1),
        "machine": describe(),
    }
    (folder / f"{COVERAGE}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
