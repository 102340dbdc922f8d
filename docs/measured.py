"""Figures from the rows of real runs below `docs/measurements`, for the pages that quote them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "measurements"
_PLACE = re.compile(r"\{([a-z_]+(?:\.[\w-]+)+)(?::([^{}]*))?\}")
"""`{file.key.key:format}`: a value of `file.json`, with Python's format."""


class NotRun(Exception):
    """A row that does not exist; the message names its file."""


def document(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What `name.json` holds. Raises NotRun when nobody measured it yet."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise NotRun(f"{name}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def fill(text: str, folder: Path = FOLDER) -> str:
    """`text` with its places filled. Raises NotRun, and KeyError or IndexError for what a row lacks."""

    def value(place: re.Match[str]) -> str:
        name, *keys = place[1].split(".")
        found: Any = document(name, folder)
        for key in keys:
            found = found[int(key)] if isinstance(found, list) else found[key]
        return format(found, place[2] or "")

    return _PLACE.sub(value, text)


def when(name: str, folder: Path = FOLDER) -> str:
    """Date and commit of a row. Raises NotRun."""
    machine = document(name, folder).get("machine", {})
    return stamp(machine.get("time", ""), machine.get("commit"))


def stamp(time: str, commit: str | None) -> str:
    """A run's day and commit, as the pages show them."""
    return " ".join(part for part in (time[:10], f"`{commit}`" if commit else "") if part)


def find(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What `name.json` holds, None when nobody measured it yet."""
    try:
        return document(name, folder)
    except NotRun:
        return None
