"""Charts of the rows: for each workload the metric that it is about, all cases, all servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks.compare.rows import Row, Table

_OURS = ("#d9822b", "#b3541e", "#f0b37e", "#7f3b08")
_PEERS = ("#4c78a8", "#59a14f", "#9ccb86", "#8a8f98", "#b07aa1")


def chart(table: Table, cases: Sequence[str], metric: str, path: Path) -> None:
    """Medians as bars from zero, with their spread."""
    rows = [row for case in cases for name in table.servers if (row := table.find(name, case, metric))]
    if not rows:
        return
    colours = _colours(table)
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 0.25 * len(cases) + 1.2), layout="constrained")
    place, ticks = 0.0, []
    for case in cases:
        of_case = [row for row in rows if row.case == case]
        for row in of_case:
            _bar(axes, place, row, colours[row.server])
            place += 1
        ticks.append((place - (len(of_case) + 1) / 2, case))
        place += 0.8
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, {rows[0].unit}".removesuffix(", "))
    axes.set_xlim(0, 1.12 * max(max(row.samples) for row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    shown = dict.fromkeys(row.server for row in rows)
    handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in shown]
    figure.legend(handles, list(shown), loc="outside upper center", ncols=len(shown), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axes: Axes, place: float, row: Row, colour: str) -> None:
    spread = [[row.median - min(row.samples)], [max(row.samples) - row.median]]
    bar = axes.barh(place, row.median, height=0.85, color=colour, xerr=spread, ecolor="#444444", capsize=2)
    axes.bar_label(bar, [f" {row.median:.3g}"], padding=4, fontsize=8)


def _colours(table: Table) -> dict[str, str]:
    """Dormouse warm, its peers cool, the same in every chart of a run."""
    ours = [name for name, facts in table.servers.items() if facts["ours"]]
    peers = [name for name in table.servers if name not in ours]
    return {name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)} | {
        name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)
    }
