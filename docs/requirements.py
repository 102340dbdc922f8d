"""The page of requirements from `requirements.toml`: each with its proof, and how its last run ended."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docs.measured import FOLDER, NotRun, document, fill, when
from docs.test_runs import TestRun

HERE = Path(__file__).parent
ROOT = HERE.parent
STATES = ("pass", "miss", "later")
NOT_RUN = "not run"
SHOWN = ("miss", NOT_RUN, "pass", "later")
"""States as the page shows them, the worst of a row's runs first."""

_HEAD = """# Requirements

{note}
What an earlier system of this kind set out to do, row by row, and where this project stands. *pass*: the
proofs named were run, and held. *miss*: run, and not reached. *not run*: the proof is there, but no run of it
is on record. *later*: not done yet. Figures come from rows in [measurements](measurements), or were noted
when they were measured.

{run}

Of {total} rows {counts}.

| | requirement | target | state | figure | last run | proof |
| --- | --- | --- | --- | --- | --- | --- |
"""
_RUN = (
    "The last full run of the tests, {when}: {passed} passed, {failed} failed, {skipped} skipped, in "
    "{minutes:.0f} minutes."
)
_NO_RUN = "No full run of the tests is on record."


@dataclass(frozen=True)
class Requirement:
    """A row. `tests` are paths from the root of the repository, with `::test_name` where one is meant.

    `promises` are promises of a row that has some (`soak: the disk quota holds`), by what they begin with;
    `measured` may have places for figures of rows (docs/measured.py). A state of `pass` is a claim, which
    the runs have to bear out.
    """

    id: str
    text: str
    target: str
    state: str
    tests: list[str] = field(default_factory=list)
    promises: list[str] = field(default_factory=list)
    measured: str = ""
    remark: str = ""

    def problems(self) -> list[str]:
        """What is wrong with the row; nothing, if all is well."""
        found = [f"{self.id}: {test} does not exist" for test in self.tests if not _exists(test)]
        if self.state not in STATES:
            found.append(f"{self.id}: state '{self.state}' is none of {', '.join(STATES)}")
        if self.state == "pass" and not self.tests and not self.promises:
            found.append(f"{self.id}: passes without a proof")
        if self.state != "pass" and not self.remark:
            found.append(f"{self.id}: does not say what is missing")
        try:
            self.figure()
        except (KeyError, IndexError, ValueError) as error:
            found.append(f"{self.id}: its figure is not in the row: {error!r}")
        return found

    def standing(self, run: TestRun | None, folder: Path = FOLDER) -> tuple[str, str]:
        """The state that the last runs give it, and when they were."""
        if self.state != "pass":
            return self.state, ""
        found = [*self._tested(run), *self._promised(folder)]
        states = [state for state, _ in found] or [NOT_RUN]
        times = dict.fromkeys(time for _, time in found if time)
        return min(states, key=SHOWN.index), "<br>".join(times)

    def figure(self) -> str:
        """The figure, or that its row is not there."""
        try:
            return fill(self.measured)
        except NotRun as error:
            return f"not run ({error})"

    def row(self, run: TestRun | None) -> str:
        """A line of the table."""
        state, last = self.standing(run)
        proof = [*map(_link, self.tests), *self.promises, *([self.remark] if self.remark else [])]
        cells = (self.id, self.text, self.target, state, self.figure(), last, "<br>".join(proof))
        return f"| {' | '.join(cells)} |"

    def _tested(self, run: TestRun | None) -> Iterator[tuple[str, str]]:
        for test in self.tests:
            if not _is_run_by_pytest(test):
                continue
            counts = run.counts(test) if run else {"passed": 0, "failed": 0}
            if run is None or not counts["passed"] + counts["failed"]:
                yield NOT_RUN, ""
            else:
                yield "miss" if counts["failed"] else "pass", run.when

    def _promised(self, folder: Path) -> Iterator[tuple[str, str]]:
        for promise in self.promises:
            name, _, words = promise.partition(": ")
            try:
                rows = document(name, folder)["promises"]
            except NotRun:
                yield NOT_RUN, ""
                continue
            states = {row["state"] for row in rows if row["promise"].startswith(words)}
            state = "miss" if "broken" in states else "pass" if "kept" in states else NOT_RUN
            yield state, when(name, folder)


def load() -> list[Requirement]:
    """All rows in their order. Raises TypeError for a field that is not known."""
    table: dict[str, Any] = tomllib.loads((HERE / "requirements.toml").read_text(encoding="utf-8"))
    return [Requirement(**row) for row in table["requirement"]]


def problems() -> list[str]:
    """Of all rows."""
    rows = load()
    expected = [f"S{number}" for number in range(1, 50)]
    missing = [] if [row.id for row in rows] == expected else ["the rows are not S1 to S49, in order"]
    return missing + [problem for row in rows for problem in row.problems()]


def page(note: str) -> str:
    """The page; `note` says that it is generated."""
    rows, run = load(), TestRun.load()
    head = _HEAD.format(note=note, run=last_run(run), total=len(rows), counts=counts(rows, run))
    return head + "\n".join(row.row(run) for row in rows) + "\n"


def counts(rows: list[Requirement], run: TestRun | None) -> str:
    """How many rows are in which state, in words."""
    states = [row.standing(run)[0] for row in rows]
    words = {"pass": "pass", "miss": "miss", NOT_RUN: "were not run", "later": "are for later"}
    return ", ".join(f"{states.count(state)} {said}" for state, said in words.items())


def last_run(run: TestRun | None) -> str:
    """A sentence about the last full run of the tests."""
    if run is None:
        return _NO_RUN
    return _RUN.format(when=run.when, minutes=run.row["seconds"] / 60, **run.row["total"])


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{Path(path).name}](../{path})" + (f" `{name}`" if name else "")


def _is_run_by_pytest(test: str) -> bool:
    """Whether a proof is a test, or a folder of some; helpers and pages are none."""
    path = Path(test.partition("::")[0])
    folders = (("tests",), ("benchmarks", "suite"))
    of_tests = any(path.parts[: len(folder)] == folder for folder in folders)
    return of_tests and (path.suffix == "" or path.name.startswith("test_"))


def _exists(test: str) -> bool:
    """Whether the file, and the function where one is named, is there."""
    path, _, name = test.partition("::")
    file = ROOT / path
    if not name or not file.exists():
        return file.exists()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)
