"""docs/clients.md, taken apart: what it tells people to do is what the tests do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8000"


def blocks(heading: str, language: str, url: str = ADDRESS) -> list[str]:
    """The code in a language under a heading, for the server at `url`."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    found = re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)
    return [block.replace(ADDRESS, url) for block in found]


def commands(heading: str, url: str = ADDRESS) -> list[list[str]]:
    """The shell commands under a heading."""
    return [shlex.split(line) for block in blocks(heading, "sh", url) for line in block.splitlines()]


def variables(heading: str, url: str) -> dict[str, str]:
    """The environment that the shell commands under a heading set."""
    settings = [words[1] for words in commands(heading, url) if words[0] == "export"]
    return dict(setting.split("=", 1) for setting in settings)
