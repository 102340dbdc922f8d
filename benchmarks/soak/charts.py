"""Charts of a soak: what its clients waited for, what the server took, where prompts came from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_WARM, _DEEP, _COOL, _GREY = "#d9822b", "#7f3b08", "#4c78a8", "#8a8f98"
_ENDS = {"sigterm": "stopped", "sigkill": "killed"}


def latency_chart(soak: dict[str, Any], path: Path) -> None:
    """First tokens and whole normal replies, minute by minute."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    rows = [row for row in soak["minutes_of_replies"] if "p50" in row["reply_s"]]
    minutes = [row["minute"] + 0.5 for row in rows]
    for name, share, label, colour in (
        ("reply_s", "p95", "whole reply, p95", _DEEP),
        ("reply_s", "p50", "whole reply, median", _WARM),
        ("first_token_s", "p50", "first token, median", _COOL),
    ):
        axes.plot(minutes, [row[name].get(share) for row in rows], color=colour, label=label)
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    _finish(axes, soak)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def memory_chart(soak: dict[str, Any], path: Path) -> None:
    """Resident memory above, the disk and its quota below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    for life in sorted({sample["life"] for sample in soak["samples"]}):
        of_life = [sample for sample in soak["samples"] if sample["life"] == life]
        minutes = [sample["at"] / 60 for sample in of_life]
        first = life == 1
        above.plot(
            minutes,
            [s["resident"] for s in of_life],
            color=_WARM,
            label="resident, arena whole" if first else None,
        )
        private = [s["anonymous"] - s["arena_touched"] for s in of_life]
        above.plot(minutes, private, color=_COOL, label="private, beyond the arena" if first else None)
        below.plot(
            minutes,
            [s["disk_walked"] / 1e6 for s in of_life],
            color=_WARM,
            label="on disk" if first else None,
        )
        below.plot(
            minutes, [s["disk_quota"] / 1e6 for s in of_life], color=_GREY, label="quota" if first else None
        )
    above.set_ylabel("MiB")
    below.set_ylabel("MB")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        _finish(axes, soak)
    above.set_xlabel("")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cache_chart(soak: dict[str, Any], path: Path) -> None:
    """Prompt tokens of each stretch between two samples, by where they came from, in percent."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    samples = soak["samples"]
    pairs = [(a, b) for a, b in itertools.pairwise(samples) if a["life"] == b["life"]]
    width = max(1, len(pairs) // 30)
    minutes, shares = [], []
    for start in range(0, len(pairs), width):
        some = pairs[start : start + width]
        grown = [
            sum(b["tokens"][source] - a["tokens"][source] for a, b in some)
            for source in ("memory", "disk", "computed")
        ]
        if sum(grown):
            minutes.append(some[len(some) // 2][1]["at"] / 60)
            shares.append([100 * tokens / sum(grown) for tokens in grown])
    if shares:
        labels = ("found in memory", "read from disk", "computed")
        axes.stackplot(minutes, *zip(*shares, strict=True), labels=labels, colors=(_WARM, _COOL, _GREY))
    axes.set_ylabel("% of prompt tokens")
    axes.set_ylim(0, 100)
    _finish(axes, soak)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _finish(axes: Axes, soak: dict[str, Any]) -> None:
    """What all share: minutes, and marks where the server ended and crowds came."""
    for life in soak["lives"]:
        if life["end"] in _ENDS and life["ended"] < 60 * soak["minutes"] - 1:
            axes.axvline(life["ended"] / 60, color="#444444", linewidth=0.8, linestyle=":")
            axes.annotate(
                _ENDS[life["end"]],
                (life["ended"] / 60, 0.97),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                rotation=90,
                va="top",
            )
    for crowd in soak["crowds"]:
        axes.axvspan(crowd["at"] / 60, (crowd["at"] + crowd["seconds"]) / 60, color="#b07aa1", alpha=0.3)
    axes.set_xlabel("minute")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3, frameon=False, fontsize=8)
