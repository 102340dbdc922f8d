"""The page of requirements from `requirements.toml`: each with the tests that prove it, which must exist."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
STATES = ("pass", "miss", "later")

_HEAD = """# Requirements

{note}
What an earlier system of this kind set out to do, row by row, and where this project stands. *pass*: the
tests named prove it. *miss*: tried, and not reached. *later*: not done yet. Figures were measured.
Of {total} rows {passed} pass, {missed} miss and {later} are for later.

| | requirement | target | state | figure | proof |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Requirement:
    """A row. `tests` are paths from the root of the repository, with `::test_name` where one is meant."""

    id: str
    text: str
    target: str
    state: str
    tests: list[str] = field(default_factory=list)
    measured: str = ""
    remark: str = ""

    def problems(self) -> list[str]:
        """What is wrong with the row; nothing, if all is well."""
        found = [f"{self.id}: {test} does not exist" for test in self.tests if not _exists(test)]
        if self.state not in STATES:
            found.append(f"{self.id}: state '{self.state}' is none of {', '.join(STATES)}")
        if self.state == "pass" and not self.tests:
            found.append(f"{self.id}: passes without a proof")
        if self.state != "pass" and not self.remark:
            found.append(f"{self.id}: does not say what is missing")
        return found

    def row(self) -> str:
        """A line of the table."""
        proof = "<br>".join([*map(_link, self.tests), *([self.remark] if self.remark else [])])
        return f"| {self.id} | {self.text} | {self.target} | {self.state} | {self.measured} | {proof} |"


def load() -> list[Requirement]:
    """All rows in their order. Raises TypeError for a field that is not known."""
    document: dict[str, Any] = tomllib.loads((HERE / "requirements.toml").read_text(encoding="utf-8"))
    return [Requirement(**row) for row in document["requirement"]]


def problems() -> list[str]:
    """Of all rows."""
    rows = load()
    expected = [f"S{number}" for number in range(1, 50)]
    missing = [] if [row.id for row in rows] == expected else ["the rows are not S1 to S49, in order"]
    return missing + [problem for row in rows for problem in row.problems()]


def page(note: str) -> str:
    """The page; `note` says that it is generated."""
    rows = load()
    count = {state: sum(row.state == state for row in rows) for state in STATES}
    head = _HEAD.format(
        note=note, total=len(rows), passed=count["pass"], missed=count["miss"], later=count["later"]
    )
    return head + "\n".join(row.row() for row in rows) + "\n"


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{Path(path).name}](../{path})" + (f" `{name}`" if name else "")


def _exists(test: str) -> bool:
    """Whether the file, and the function where one is named, is there."""
    path, _, name = test.partition("::")
    file = ROOT / path
    if not name or not file.exists():
        return file.exists()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)
