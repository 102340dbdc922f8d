"""The README's commands exist, its links lead somewhere, its Python works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import openai
import pytest
from tests.docs.clients_page import commands
from typer.testing import CliRunner

from dormouse.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
CLIENTS = [shlex.join(words) for words in commands("Room for coding clients")]
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()] + CLIENTS
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    assert program == "dormouse"
    group = [word for word in words[:2] if word.isalpha()]
    for length in (2, 1):
        asked = CliRunner().invoke(app, [*group[:length], "--help"])
        if asked.exit_code == 0:
            break
    assert asked.exit_code == 0, asked.output
    for flag in (word for word in words if word.startswith("--")):
        assert flag in asked.output, f"{command}: {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.strip()).exists(), f"{page.name}: {target}"


def test_the_python_example_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def create(_: object, **fields: Any) -> Any:
        asked.append(fields)
        return MagicMock()

    monkeypatch.setattr(openai.resources.chat.Completions, "create", create)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    scope["client"].close()
    assert asked[0]["extra_headers"] == {"X-Agent-ID": "geographer"}


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    words = {shlex.join(shlex.split(line)) for line in script.splitlines() if line.startswith("make")}
    suite = "make bench-suite SCALE=small ARGS=-q"
    assert words == {"make lint", "make test", suite, shlex.join(["make", "soak", "ARGS=--minutes 3"])}
    assert words <= {shlex.join(shlex.split(command)) for command in COMMANDS}
