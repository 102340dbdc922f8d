"""Pages made of rows: figures are the rows', what was not run says so, and runs bear out claims."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from docs.measured import NotRun
from docs.requirements import Requirement
from docs.test_runs import TestRun

from docs import measured, summary, test_runs

HERE = "tests/docs/test_report.py"
JUNIT = f"""<?xml version="1.0"?>
<testsuites><testsuite name="pytest" timestamp="2026-01-02T03:04:05" time="61.5">
<testcase classname="tests.docs.test_report" name="test_good[a]" file="{HERE}" time="1.5">
<properties><property name="seconds" value="0.25"/></properties></testcase>
<testcase classname="tests.docs.test_report" name="test_bad[b]" file="{HERE}" time="0.5"><failure/></testcase>
<testcase classname="tests.docs.test_report" name="test_none" file="{HERE}" time="0"><skipped/></testcase>
<testcase classname="tests.api.test_x" name="test_y" file="tests/api/test_x.py" time="2"/>
</testsuite></testsuites>"""


@pytest.fixture
def run(tmp_path: Path) -> TestRun:
    (tmp_path / "junit.xml").write_text(JUNIT)
    return TestRun(test_runs.read(tmp_path / "junit.xml"))


def keep(folder: Path, name: str, row: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(row))


def test_what_a_run_covered_is_kept_in_percent(tmp_path: Path) -> None:
    totals = {
        "covered_lines": 9, "num_statements": 10, "covered_branches": 3, "num_branches": 4,
        "percent_covered": 85.714,
    }  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"meta": {"timestamp": "2026-01-02T03:04:05"}, "totals": totals}))
    test_runs.keep_coverage(report, tmp_path)
    row = measured.document("coverage", tmp_path)
    assert (row["percent"], row["lines_percent"], row["branches_percent"]) == (85.7, 90.0, 75.0)
    assert row["machine"]["commit"]


def test_a_run_is_kept_in_short(run: TestRun) -> None:
    assert run.row["total"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert run.row["folders"]["api"] == {"passed": 1, "seconds": 2.0}
    assert run.row["files"][HERE] == {"passed": 1, "failed": 1, "skipped": 1, "seconds": 2.0}
    assert run.row["failed"] == [f"{HERE}::test_bad[b]"]
    assert run.row["figures"] == {f"{HERE}::test_good[a]": {"seconds": "0.25"}}
    assert run.row["seconds"] == 61.5
    assert run.when.startswith("2026-01-02")


def test_counts_are_of_a_file_a_folder_or_one_test(run: TestRun) -> None:
    assert run.counts("tests/api/test_x.py") == {"passed": 1, "failed": 0, "skipped": 0}
    assert run.counts("tests") == {"passed": 2, "failed": 1, "skipped": 1}
    assert run.counts("tests/ap") == {"passed": 0, "failed": 0, "skipped": 0}
    assert run.counts(f"{HERE}::test_good")["failed"] == 0
    assert run.counts(f"{HERE}::test_bad")["failed"] == 1


@pytest.mark.parametrize(
    ("state", "tests", "expected"),
    [
        ("pass", [f"{HERE}::test_good"], "pass"),
        ("pass", [f"{HERE}::test_bad"], "miss"),
        ("pass", [HERE], "miss"),
        ("pass", ["tests/api/test_x.py"], "pass"),
        ("pass", ["tests/api/test_x.py", HERE], "miss"),
        ("pass", ["tests/api/test_x.py", "tests/smoke"], "not run"),
        ("pass", ["tests/live.py"], "not run"),
        ("later", [HERE], "later"),
        ("miss", [HERE], "miss"),
    ],
)
def test_a_claim_is_what_its_run_makes_of_it(
    run: TestRun, state: str, tests: list[str], expected: str
) -> None:
    row = Requirement("S0", "text", "target", state, tests, remark="x")
    assert row.standing(run)[0] == expected
    assert row.standing(None)[0] == ("not run" if state == "pass" else state)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["kept"], "pass"),
        (["kept", "broken"], "miss"),
        (["not judged"], "not run"),
        (["kept", "not judged"], "pass"),
    ],
)
def test_a_promise_is_proof(tmp_path: Path, states: list[str], expected: str) -> None:
    promises = [{"promise": f"memory does not grow {n}", "state": state} for n, state in enumerate(states)]
    other = [{"promise": "the rest", "state": "broken"}]
    machine = {"time": "2026-01-02T03:04:05", "commit": "abc"}
    row = Requirement("S0", "text", "target", "pass", promises=["soak: memory does not grow"])
    assert row.standing(None, tmp_path) == ("not run", "")
    keep(tmp_path, "soak", {"promises": promises + other, "machine": machine})
    assert row.standing(None, tmp_path) == (expected, "2026-01-02 `abc`")


def test_figures_come_from_rows(tmp_path: Path) -> None:
    keep(tmp_path, "wake", {"ms": 24.6, "runs": [{"ms": 1}, {"ms": 2}]})
    assert measured.fill("{wake.ms:.0f} ms, then {wake.runs.1.ms}", tmp_path) == "25 ms, then 2"
    assert measured.fill("nothing {to} fill", tmp_path) == "nothing {to} fill"
    with pytest.raises(NotRun, match=r"sleep\.json"):
        measured.fill("{sleep.ms}", tmp_path)
    with pytest.raises(KeyError):
        measured.fill("{wake.s}", tmp_path)


def test_a_row_that_lacks_its_figure_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "document", lambda *_: {"ms": 1})
    row = Requirement("S0", "text", "target", "pass", [HERE], measured="{wake.seconds}")
    assert any("not in the row" in problem for problem in row.problems())
    assert math.isclose(float(Requirement("S0", "", "", "pass", [HERE], measured="{wake.ms}").figure()), 1)


def test_the_summary_says_what_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    text = summary.render("")
    assert "soak" in text.partition("Not run, or not kept as a row: ")[2]
    assert "CUDA and Metal" in text
