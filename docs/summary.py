"""The summary: what is better than any peer, what is not, what was not measured, all from rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.compare import page, prose, restart
from benchmarks.compare.figures import Tables, better
from benchmarks.compare.figures import figures as aims
from benchmarks.compare.rows import Row, Table

from docs import measured, requirements
from docs.measured import NotRun
from docs.test_runs import TestRun

EXPECTED = (
    "coverage",
    "demo",
    "flood",
    "memory",
    "prefill",
    "decode",
    "quality",
    "soak",
    "stress",
    "suite",
    "swap",
    "tests",
    "torture",
    "wake",
)
"""Rows that a full set of runs leaves in docs/measurements."""

_HEAD = """Dormouse serves many agents that share one model, and keeps each one's KV cache on disk. This
page says in short what that is worth and what it is not, from the rows in [measurements](measurements):
the comparison is in [benchmarks.md](benchmarks.md), the hour under load in [soak.md](soak.md), every
requirement in [requirements.md](requirements.md), what lies behind the figures in
[performance.md](performance.md)."""

_ALONE = """What no peer has: an agent's whole past survives a stop, a SIGKILL, an eviction and a
damaged file, and the agent goes on with the same words. After a restart an agent of {wake.context}
tokens says its next token after {wake.wake_ttft_ms:.0f} ms, where reading its context takes
{wake.cold_ttft_ms:.0f} ms; tokens computed again: {wake.recomputed_tokens}."""

_MEANING = """`k8v4`, the default, stores {quality.formats.2.bytes_per_token:.0f} bytes of KV per token
where bf16 takes {quality.formats.0.bytes_per_token:.0f}; perplexity is
{quality.formats.2.against_first} against bf16."""

_NOT_MEASURED = """- CUDA and Metal: there was no such machine. `--device cuda` and `--device mps` run
  the same code, and nothing is claimed of them.
- Models of other sizes, processors of other makers, more than two cores: the ratios will differ.
- Days: the longest run is the one in [soak.md](soak.md)."""


def render(note: str) -> str:
    """The page."""
    tables = page.load(page.ROWS)
    parts = ["# Summary", note.strip(), _HEAD, "## What only Dormouse does", *_filled(_ALONE)]
    compared = list(_compared(tables))
    ahead = [line for ratio, line in compared if ratio > 1]
    behind = [line for ratio, line in compared if ratio <= 1]
    parts += ["## Better than every peer that was measured", _table(ahead)]
    parts += [
        "## Not better, or not good enough",
        _table(behind) if behind else "In none of these cases a peer was better.",
    ]
    parts += ["\n".join(_missed(tables)), *_filled(_MEANING)]
    parts += ["## Under load", *_soak(), "## Whether it was run", *_runs()]
    parts += ["## What was not measured", _NOT_MEASURED + "".join(f"\n- {line}" for line in _absent())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _compared(tables: Tables) -> Iterator[tuple[float, str]]:
    """Each case of each workload's main metric against the best peer that managed it, and waking against
    what a peer restores by hand."""
    for section in prose.SECTIONS:
        if (table := tables.get(section.workload)) is None:
            continue
        pairs = [(case, case) for case in list(section.cases) or table.cases()]
        if section.workload == "restart":
            pairs.append((restart.WAKE, restart.BY_HAND))
        for case, theirs in pairs:
            yield from _against_best(table, section, case, theirs)


def _against_best(
    table: Table, section: prose.Section, case: str, theirs: str
) -> Iterator[tuple[float, str]]:
    own = next((name for name, facts in table.servers.items() if facts["ours"]), "")
    ours = table.find(own, case, section.metric)
    peers = [
        row
        for name, facts in table.servers.items()
        if not facts["ours"] and (row := table.find(name, theirs, section.metric))
    ]
    if ours is None or not peers:
        return
    best = min(peers, key=lambda row: better(ours, row))
    named = case if case == theirs else f"{case}, against {theirs}"
    ratio = better(ours, best)
    yield (
        ratio,
        f"| `{section.workload}` {named} | {section.metric} | {_shown(ours)} "
        f"| {_shown(best)} ({best.server}) | {ratio:.2g}x |",
    )


def _table(lines: list[str]) -> str:
    return "\n".join(
        ["| case | metric | Dormouse | best peer | better by |", "| --- | --- | --- | --- | --- |", *lines]
    )


def _missed(tables: Tables) -> Iterator[str]:
    """What was aimed at and missed."""
    if not tables:
        return
    yield "Aims of the comparison that were missed:"
    yield ""
    for figure in aims(page.scale_of(tables)):
        for name in page.ours_of(tables):
            reached = figure.render(tables, name)
            if "missed" in reached:
                who = f" ({name})" if len(figure.held) > 1 else ""
                aim = f"{figure.render_aim()} was aimed at"
                yield f"- {figure.what}{who}: {aim}; {reached.partition(',')[0]}"


def _soak() -> Iterator[str]:
    try:
        soak: dict[str, Any] = measured.document("soak")
    except NotRun:
        yield "Not run: no hour of [soak.md](soak.md) is on record."
        return
    kept = sum(row["state"] == "kept" for row in soak["promises"])
    yield (
        f"{soak['requests']} requests of {soak['sessions']} conversations in {soak['minutes']:g} minutes, "
        f"through {len(soak['lives']) - 1} restarts and {len(soak['crowds'])} crowds: {kept} of "
        f"{len(soak['promises'])} promises were kept."
    )
    rest = [row for row in soak["promises"] if row["state"] != "kept"]
    if rest:
        yield "\n".join(
            f"- {row['promise']}: {row['state']} ({row['figure'] or row['remark']})" for row in rest
        )
    latency = soak["latency"]
    yield (
        f"First token p50 / p95 / p99 {_shares(latency['first_token_s'])} s, gaps between pieces of text "
        f"{_shares(latency['gap_ms'])} ms, whole replies of {soak['reply_tokens']} tokens "
        f"{_shares(latency['reply_s'])} s."
    )


def _runs() -> Iterator[str]:
    run = TestRun.load()
    rows = requirements.load()
    yield requirements.last_run(run)
    yield f"Of {len(rows)} requirements {requirements.counts(rows, run)}."


def _absent() -> Iterator[str]:
    missing = [name for name in EXPECTED if not (measured.FOLDER / f"{name}.json").exists()]
    if missing:
        yield f"Not run, or not kept as a row: {', '.join(missing)}."


def _filled(text: str) -> Iterator[str]:
    """A paragraph with its figures; if a row is not there, which."""
    try:
        yield " ".join(measured.fill(text).split())
    except NotRun as error:
        yield f"Not run: {error}."


def _shown(row: Row) -> str:
    return f"{row.median:,.0f} {row.unit}" if row.median >= 100 else f"{row.median:.3g} {row.unit}"


def _shares(row: dict[str, float]) -> str:
    return " / ".join(str(row.get(name, "none")) for name in ("p50", "p95", "p99"))
