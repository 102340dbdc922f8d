"""What was measured: one row for each server, case and metric, with all its samples or why there are none."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """The samples of one metric; without any, `note` says why."""

    workload: str
    case: str
    server: str
    metric: str
    unit: str
    samples: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the samples. Raises StatisticsError without any."""
        return statistics.median(self.samples)

    @property
    def more_is_better(self) -> bool:
        """Whether a larger figure is the better one; of times and of bytes a smaller one is."""
        return self.unit in ("tokens/s", "agents")

    def as_json(self) -> dict[str, Any]:
        """The row with its median and spread."""
        if not self.samples:
            return asdict(self)
        spread = {"median": self.median, "min": min(self.samples), "max": max(self.samples)}
        return asdict(self) | {key: round(value, 4) for key, value in spread.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        """The row that `as_json` made."""
        known = {key: fields[key] for key in ("workload", "case", "server", "metric", "unit", "note")}
        return cls(**known, samples=tuple(fields["samples"]))


class Board:
    """Collects the samples of one workload while it runs."""

    def __init__(self, workload: str) -> None:
        self.workload = workload
        self._samples: dict[tuple[str, str, str, str], list[float]] = {}
        self._notes: dict[tuple[str, str], str] = {}

    def add(self, server: str, case: str, metric: str, unit: str, *values: float) -> None:
        """Samples of a metric."""
        kept = self._samples.setdefault((case, server, metric, unit), [])
        kept.extend(round(value, 4) for value in values)

    def samples(self, server: str, case: str, metric: str) -> list[float]:
        """The samples of a metric so far."""
        return [
            value
            for (at, name, measured, _), values in self._samples.items()
            if (at, name, measured) == (case, server, metric)
            for value in values
        ]

    def note(self, server: str, case: str, reason: str) -> None:
        """Why a case has no samples, or not all; the first reason stays."""
        self._notes.setdefault((case, server), reason)

    def carry(self, case: str, heavier: str) -> None:
        """Who failed at `case` is not asked for `heavier`, and its note there says so."""
        for (failed, server), reason in list(self._notes.items()):
            if failed == case:
                self.note(
                    server,
                    heavier,
                    reason if reason.startswith("not ") else f"not tried: at {case} it {reason}",
                )

    def failure(self, server: str, case: str) -> str | None:
        """The reason noted for a case, if there is one."""
        return self._notes.get((case, server))

    def rows(self) -> list[Row]:
        """All rows: what has samples, with its note, and what has only a note."""
        rows = [
            Row(self.workload, case, server, metric, unit, tuple(values), self._notes.get((case, server), ""))
            for (case, server, metric, unit), values in self._samples.items()
        ]
        measured = {(row.case, row.server) for row in rows}
        missing = [key for key in self._notes if key not in measured]
        return rows + [
            Row(self.workload, case, server, "", "", (), self._notes[case, server])
            for case, server in missing
        ]


@dataclass(frozen=True)
class Table:
    """The rows of one run of one workload, and what they were taken with."""

    workload: str
    settings: dict[str, Any]
    servers: dict[str, dict[str, Any]]
    machine: dict[str, Any]
    rows: tuple[Row, ...]

    def save(self, folder: Path) -> Path:
        """Write `WORKLOAD.json`, one row a line."""
        folder.mkdir(parents=True, exist_ok=True)
        head = {"workload": self.workload, "settings": self.settings, "servers": self.servers}
        text = json.dumps(head | {"machine": self.machine}, indent=2)
        lines = ",\n".join(f"    {json.dumps(row.as_json())}" for row in self.rows)
        path = folder / f"{self.workload}.json"
        path.write_text(f'{text[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n')
        return path

    @classmethod
    def load(cls, path: Path) -> Table:
        """The table that `save` wrote."""
        fields = json.loads(path.read_text())
        rows = tuple(Row.from_json(row) for row in fields["rows"])
        return cls(fields["workload"], fields["settings"], fields["servers"], fields["machine"], rows)

    def find(self, server: str, case: str, metric: str) -> Row | None:
        """The row with samples of a metric, None if it was not measured."""
        return next(
            (
                row
                for row in self.rows
                if (row.server, row.case, row.metric) == (server, case, metric) and row.samples
            ),
            None,
        )

    def cases(self) -> list[str]:
        """Its cases, in the order in which they were measured."""
        return _unique(row.case for row in self.rows)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed. Raises ValueError for none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a percentile of nothing")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
