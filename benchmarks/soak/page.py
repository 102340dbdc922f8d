"""`docs/soak.md` and its charts from the document of a soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES = "images"
CHARTS = ("soak-latency.png", "soak-memory.png", "soak-cache.png")

_HEAD = """A realistic load, for an hour, against the real server with the embedded model: coding agents
with tools and growing contexts (messages and chat completions), people who chat (chat completions,
Responses with a past that the server keeps, `/v1/agents` with forks), crews of subagents that share a
system prompt. They think, nap and come back, leave in mid-stream, are deleted. The server is stopped
once and killed twice meanwhile, and twice more come at once than may run and wait.
[benchmarks/soak/mix.toml](../benchmarks/soak/mix.toml) has the mix; `make soak` runs it again, `make
soak ARGS="--minutes 3"` a short one. Its own harness on asyncio and httpx does it, since agents have to
outlive the server, know what they were told before, and be the same for each seed; load tools drive
requests that know nothing of each other."""

_NOT_RUN = "No run is on record: `make soak` makes one (an hour), then `make report`."

_METHOD = """Latency is of requests outside of crowds, wakes after restarts included. A normal reply has
up to {reply_tokens} tokens. Resident memory counts the arena whole, of which a system hands out what
was touched; growth is the median of the last tenth against that of the first, over samples of servers
older than the warm-up of {warm_up_s} s."""


def render(soak: dict[str, Any] | None, note: str) -> str:
    """The page; without a document it says that nothing was run."""
    parts = ["# An hour of agents", note.strip(), _HEAD]
    return "\n\n".join([*parts, *(_report(soak) if soak else [_NOT_RUN])]) + "\n"


def _report(soak: dict[str, Any]) -> Iterator[str]:
    machine = soak["machine"]
    yield (
        f"Run on {machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, "
        f"{machine['time'][:10]}, commit {machine['commit']}: {soak['minutes']:g} of "
        f"{soak['planned_minutes']:g} minutes planned, {soak['requests']} requests in {soak['sessions']} "
        f"conversations, seed {soak['seed']}" + (". **It was interrupted.**" if soak["interrupted"] else ".")
    )
    yield "## What was promised"
    states = Counter(row["state"] for row in soak["promises"])
    yield ", ".join(f"{count} {state}" for state, count in states.most_common()) + "."
    yield "\n".join(_promises(soak))
    yield "## Latency"
    yield _METHOD.format(reply_tokens=soak["reply_tokens"], warm_up_s=soak["memory"]["warm_up_s"])
    yield f"![first token and whole replies over time]({IMAGES}/soak-latency.png)"
    yield "\n".join(_latency(soak["latency"]))
    yield "## Where prompts came from"
    yield "\n".join(_hits(soak["hits"]))
    yield f"![prompt tokens by source over time]({IMAGES}/soak-cache.png)"
    yield "## Memory and disk"
    yield f"![resident memory and disk over time]({IMAGES}/soak-memory.png)"
    yield "\n".join(_memory(soak["memory"]))
    yield "## What became of the requests"
    yield "\n".join(_outcomes(soak["outcomes"]))
    yield (
        "Left: the client went away in mid-stream, as it meant to. Refused: 429 or 529 in a crowd. "
        "Restart: cut or turned away by one."
    )


def _promises(soak: dict[str, Any]) -> Iterator[str]:
    yield "| promise | bound | figure | |"
    yield "| --- | --- | --- | --- |"
    for row in soak["promises"]:
        state = f"**{row['state']}**" if row["state"] == "broken" else row["state"]
        remark = f": {_cell(row['remark'])}" if row["remark"] else ""
        yield f"| {row['promise']} | {row['bound']} | {_cell(row['figure'])} | {state}{remark} |"


def _latency(latency: dict[str, Any]) -> Iterator[str]:
    yield "| | p50 | p95 | p99 | samples |"
    yield "| --- | --- | --- | --- | --- |"
    rows = {
        "first token, s": latency["first_token_s"],
        **{f"first token, s: {kind}": row for kind, row in latency["first_token_s_by_kind"].items()},
        "between two pieces of text, ms": latency["gap_ms"],
        "whole normal reply, s": latency["reply_s"],
        "first token in a crowd, s": latency["first_token_s_in_a_crowd"],
    }
    for name, row in rows.items():
        yield f"| {name} | {row.get('p50', '')} | {row.get('p95', '')} | {row.get('p99', '')} | {row['n']} |"


def _hits(hits: dict[str, Any]) -> Iterator[str]:
    tokens = hits["tokens"]
    yield "| found in memory | read from disk | computed | generated |"
    yield "| --- | --- | --- | --- |"
    yield (
        f"| {tokens['memory']:,} tokens ({hits['memory_percent']}%) | {tokens['disk']:,} "
        f"({hits['disk_percent']}%) | {tokens['computed']:,} ({hits['computed_percent']}%) "
        f"| {tokens['generated']:,} |"
    )


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    yield "| | from | to | resident, MiB | of it private beyond the arena | grows by |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, what in (("run", "the whole run"), ("longest_life", "the longest life of a server")):
        if (row := memory[name]) is not None:
            before, after = row["resident_mib"]
            private = " to ".join(str(value) for value in row["private_beyond_arena_mib"])
            yield (
                f"| {what} | minute {row['from_s'] / 60:.0f} | minute {row['to_s'] / 60:.0f} "
                f"| {before} to {after} | {private} | {row['percent']}% |"
            )


def _outcomes(outcomes: dict[str, dict[str, int]]) -> Iterator[str]:
    names = ("ok", "left", "refused", "restart", "error")
    yield f"| kind | {' | '.join(names)} |"
    yield f"| --- |{' --- |' * len(names)}"
    for kind, counts in outcomes.items():
        yield f"| {kind} | {' | '.join(str(counts.get(name, 0)) for name in names)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_charts(soak: dict[str, Any], folder: Path) -> None:
    """The charts that the page shows."""
    # matplotlib is only needed here, and takes a second to import.
    from benchmarks.soak.charts import cache_chart, latency_chart, memory_chart

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in zip(CHARTS, (latency_chart, memory_chart, cache_chart), strict=True):
        draw(soak, folder / name)
