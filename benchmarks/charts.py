"""Charts of measured rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLD, WOKEN = "#8a8f98", "#d9822b"


def demo_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Time to first token of each agent, cold and after the restart, as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows))
    for shift, key, label, colour in (
        (-0.19, "cold_ttft_ms", "first time: reads its context", COLD),
        (0.19, "wake_ttft_ms", "after SIGKILL and restart: wakes", WOKEN),
    ):
        values = [row[key] for row in rows]
        bars = axes.barh([place + shift for place in places], values, height=0.36, color=colour, label=label)
        axes.bar_label(bars, [f"{value:,.0f} ms" for value in values], padding=4, fontsize=9)
    axes.set_yticks(list(places), [row["agent"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time to first token, ms")
    axes.set_xlim(0, 1.14 * max(row["cold_ttft_ms"] for row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
