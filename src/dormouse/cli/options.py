"""Flags from settings: every field of `Settings` that a command names becomes a flag of it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError
from rich.logging import RichHandler

from dormouse.cli.output import errors, fail
from dormouse.settings import ENV_PREFIX, Settings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these settings; its first parameter gets the `Settings`.

    Flags that are not given come from the environment or the defaults; values out of range end the
    command with a message each and exit code 2.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        flags = [_parameter(name) for name in names]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in names}
            command(_load(chosen), **given)

        signature = inspect.Signature([*own, *flags])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def set_up_logging(level: str) -> None:
    """Log to standard error, readable on a terminal."""
    handler = RichHandler(console=errors, show_path=False, rich_tracebacks=True)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler])
    # A line a request from the libraries says nothing that our own lines do not.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    alternatives = get_args(field.annotation) or (field.annotation,)
    # Choices stay text here: `Settings` names what is allowed when it refuses one.
    kind: Any = next((kind for kind in (int, float, Path) if kind in alternatives), str)
    flag = typer.Option(f"--{name.replace('_', '-')}", help=field.description, show_default=False)
    annotation = Annotated[kind | None, flag]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _load(flags: dict[str, Any]) -> Settings:
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            where = f"--{name.replace('_', '-')} or {ENV_PREFIX}{name.upper()}: " if name else ""
            fail(f"{where}{problem['msg'].removeprefix('Value error, ')}")
        raise typer.Exit(2) from error
