"""A requirement's proof exists, or `make lint` fails."""

from __future__ import annotations

import pytest
from docs.requirements import Requirement

from docs import requirements

HERE = "tests/docs/test_requirements.py"


def test_all_rows_are_in_order() -> None:
    assert requirements.problems() == []


@pytest.mark.parametrize(
    ("state", "tests", "remark", "problem"),
    [
        ("pass", [f"{HERE}::test_all_rows_are_in_order"], "", None),
        ("pass", [HERE], "", None),
        ("pass", ["tests/nowhere.py"], "", "does not exist"),
        ("pass", [f"{HERE}::test_nothing"], "", "does not exist"),
        ("pass", [], "", "without a proof"),
        ("later", [], "", "what is missing"),
        ("soon", [], "x", "is none of"),
    ],
)
def test_a_row_is_checked(state: str, tests: list[str], remark: str, problem: str | None) -> None:
    found = Requirement("S0", "text", "target", state, tests, remark=remark).problems()
    assert len(found) == (problem is not None)
    assert all(problem in one for one in found if problem)
