"""The mix of a soak as data: `mix.toml` says what each field is for."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

MIX = Path(__file__).with_name("mix.toml")


class Shape(StrEnum):
    """How an agent behaves."""

    CODER = "coder"
    TALKER = "talker"
    CREW = "crew"


class What(StrEnum):
    """What happens at a moment."""

    SIGTERM = "sigterm"
    SIGKILL = "sigkill"
    CROWD = "crowd"


@dataclass(frozen=True)
class ServerOf:
    """The server's bounds."""

    arena_tokens: int
    max_running: int
    max_queue: int
    disk_quota_gb: float

    @property
    def flags(self) -> list[str]:
        """As `dormouse serve` takes them."""
        values = vars(self).items()
        return [word for name, value in values for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True)
class RunOf:
    """How the run goes; `warm_up` is a share of it."""

    sample_s: float
    warm_up: float
    reply_tokens: int
    twins: int
    crowd: int


@dataclass(frozen=True)
class PromisesOf:
    """The bounds of what is promised."""

    growth_percent: float
    reply_p95_s: float
    threads_more: int
    descriptors_more: int
    others_percent: float
    judged_minutes: float


@dataclass(frozen=True)
class Moment:
    """Something that happens once; `at` is a share of the run."""

    at: float
    what: What


@dataclass(frozen=True)
class Kind:
    """Agents of one kind. Chances are between 0 and 1, `nap` is a share of the run as well as its chance."""

    name: str
    shape: Shape
    dialect: str
    agents: int
    think_s: float
    brings: tuple[int, int]
    longest: int
    nap: float = 0.0
    leave: float = 0.0
    fork: float = 0.0
    delete: float = 0.0
    crew: int = 0


@dataclass(frozen=True)
class Mix:
    """All of it."""

    server: ServerOf
    run: RunOf
    promises: PromisesOf
    moments: tuple[Moment, ...]
    kinds: tuple[Kind, ...]

    @classmethod
    def load(cls, path: Path = MIX) -> Mix:
        """Of a file. Raises TypeError for a field that is missing or unknown, ValueError for a bad value."""
        text: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        moments = [Moment(row["at"], What(row["what"])) for row in text["moment"]]
        kinds = [
            Kind(**row | {"shape": Shape(row["shape"]), "brings": tuple(row["brings"])})
            for row in text["kind"]
        ]
        return cls(
            ServerOf(**text["server"]),
            RunOf(**text["run"]),
            PromisesOf(**text["promises"]),
            tuple(sorted(moments, key=lambda moment: moment.at)),
            tuple(kinds),
        )
