"""Where settings come from: flags, then the environment, then a TOML file, then the defaults.

A name that is no setting is refused wherever it stands: a mistyped bound that is silently ignored is found
when it is needed.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from dormouse.domain.errors import BadSettings
from dormouse.settings import ENV_PREFIX, Settings

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"

_OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, f"{ENV_PREFIX}NO_NATIVE"})
"""Variables of ours that are no settings."""

_DID_YOU_MEAN = 3


def default_config() -> Path:
    """The file that is read, if it exists, when none is named."""
    return platformdirs.user_config_path("dormouse") / "config.toml"


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """The settings of one command. `flags` has those that were given; `config` names the file.

    Raises BadSettings with every problem and where each value was set. Values are not quoted: one of them
    may be a secret.
    """
    path = config or default_config()
    from_file = _read(path) if config is not None or path.exists() else {}
    _refuse_unknown_variables(os.environ)
    from_env = EnvSettingsSource(Settings)()
    try:
        return Settings(**{**from_file, **from_env, **flags})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            where = f"{_where(name, flags, from_env, from_file, path)}: " if name else ""
            problems.append(where + problem["msg"].removeprefix("Value error, "))
        # Without the cause, which quotes the values.
        raise BadSettings(problems) from None


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"{ENV_PREFIX}{name.upper()}"


def _where(
    name: str, flags: Mapping[str, Any], from_env: Mapping[str, Any], from_file: Mapping[str, Any], path: Path
) -> str:
    if name not in flags and name not in from_env and name in from_file:
        return f"{name} in {path}"
    return flag_of(name) if name in flags else variable_of(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings([f"{path} cannot be read: {error.strerror}; name another file"]) from error
    except ValueError as error:  # TOML and UTF-8 alike
        raise BadSettings([f"{path} is no TOML: {error}"]) from error
    values = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = [name for name in values if name not in Settings.model_fields]
    if unknown:
        raise BadSettings(
            f"{path} sets '{name}', which is no setting{_hint(name, Settings.model_fields)}"
            for name in unknown
        )
    return values


def _refuse_unknown_variables(environment: Iterable[str]) -> None:
    known = {variable_of(name) for name in Settings.model_fields} | _OTHER_VARIABLES
    unknown = [name for name in environment if name.startswith(ENV_PREFIX) and name not in known]
    if unknown:
        raise BadSettings(f"{name} is set but is no setting{_hint(name, known)}" for name in unknown)


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=_DID_YOU_MEAN)
    return f"; did you mean {' or '.join(near)}?" if near else "; docs/settings.md lists them"
