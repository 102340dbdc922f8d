"""Flags from settings: every field of `Settings` that a command names becomes a flag of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dormouse.cli.config import CONFIG_VARIABLE, flag_of, load_settings
from dormouse.cli.output import fail
from dormouse.domain.errors import BadSettings
from dormouse.settings import Settings

_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            envvar=CONFIG_VARIABLE,
            show_envvar=False,
            show_default=False,
            dir_okay=False,
            help="TOML file of settings; by default config.toml in the user's config folder, if it exists.",
        ),
    ],
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these settings; its first parameter gets the `Settings`.

    Flags that are not given come from the environment, the file of `--config` or the defaults; unknown
    names and values out of range end the command with a message each and exit code 2.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        flags = [_parameter(name) for name in names]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            flags = {name: given.pop(name) for name in names}
            command(_load(flags, given.pop("config")), **given)

        signature = inspect.Signature([*own, *flags, _CONFIG])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def key_header(settings: Settings) -> dict[str, str]:
    """The header that carries the API key to a running server."""
    return {"x-api-key": settings.api_key.get_secret_value()} if settings.api_key else {}


def _parameter(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    alternatives = get_args(field.annotation) or (field.annotation,)
    # Choices stay text here: `Settings` names what is allowed when it refuses one.
    kind: Any = next((kind for kind in (bool, int, float, Path) if kind in alternatives), str)
    words = f"{flag_of(name)}/{flag_of(f'no_{name}')}" if kind is bool else flag_of(name)
    flag = typer.Option(words, help=field.description, show_default=False)
    annotation = Annotated[kind | None, flag]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _load(flags: dict[str, Any], config: Path | None) -> Settings:
    try:
        return load_settings({name: value for name, value in flags.items() if value is not None}, config)
    except BadSettings as error:
        for problem in error.problems:
            fail(problem)
        raise typer.Exit(2) from error
