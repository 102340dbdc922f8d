"""What commands print: a table for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dormouse.domain.errors import DormouseError
from dormouse.models.progress import Progress

console = Console()
errors = Console(stderr=True)


def fail(message: object, *, code: int = 1) -> typer.Exit:
    """Print an error, whatever characters it has; the exit to be raised."""
    errors.print(Text.assemble(("error: ", "bold red"), str(message)), soft_wrap=True)
    return typer.Exit(code)


def emit_json(document: Any) -> None:
    """Print one JSON document, plain, whatever the terminal."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def table(rows: list[dict[str, Any]], empty: str) -> None:
    """Print rows of equal keys as a table, or `empty`."""
    if not rows:
        console.print(empty)
        return
    out = Table(*(key.replace("_", " ") for key in rows[0]))
    for row in rows:
        out.add_row(*(Text(str(value)) for value in row.values()))
    console.print(out)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn our own errors into a message and exit code 1; anything else is a bug and shows itself."""
    try:
        yield
    except DormouseError as error:
        raise fail(error) from error


def human_nbytes(count: float) -> str:
    """`1.2 MB`: decimal, as disks are sold and quotas are set."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error for long work, one line for each thing that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=errors) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield on_progress
