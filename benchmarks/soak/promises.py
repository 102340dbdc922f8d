"""What a soak has to show, each promise with its figure, its bound and whether it was kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.soak.mix import PromisesOf
from benchmarks.soak.samples import Sample

_SETTLED_S = 20.0
"""After a restart all agents come back at once; so long a server may say that it is full."""

KEPT, BROKEN, NOT_JUDGED = "kept", "broken", "not judged"


@dataclass(frozen=True)
class Verdict:
    """One promise. `remark` says what broke it, or why it was not judged."""

    promise: str
    bound: str
    figure: str
    state: str
    remark: str = ""

    def as_json(self) -> dict[str, str]:
        """A row."""
        return dict(vars(self))


def verdicts(
    soak: dict[str, Any], samples: list[Sample], most_disk: int, bounds: PromisesOf
) -> list[Verdict]:
    """All of them, of the document of a soak.

    While other processes have the cores, times are not judged, nor how much happened in the time there was.
    Times and memory of a short run are not judged.
    """
    others = statistics.median(sample.others_percent for sample in samples) if samples else 0.0
    busy = f"other processes took {others:.0f}% of the cores" if others > bounds.others_percent else ""
    cut = soak["interrupted"] or soak["failure"]
    return [
        *_of_answers(soak),
        *(
            _unless(verdict, busy or ("the run was cut short" if cut else ""))
            for verdict in _of_pace(soak, bounds)
        ),
        *_of_memory(soak, bounds),
        *_of_bounds(samples, most_disk),
        *_of_words(soak),
        *(_unless(verdict, "the run was cut short" if cut else "") for verdict in _of_the_end(soak)),
    ]


def _unless(verdict: Verdict, reason: str) -> Verdict:
    """What is not kept for a `reason` that is not the server's is not judged."""
    return (
        replace(verdict, state=NOT_JUDGED, remark=reason) if reason and verdict.state == BROKEN else verdict
    )


def _short(soak: dict[str, Any], bounds: PromisesOf) -> str:
    """Why times and memory of this run are not judged; empty if they are."""
    return "" if soak["minutes"] >= bounds.judged_minutes else "the run was short"


def _of_answers(soak: dict[str, Any]) -> Iterator[Verdict]:
    errors = soak["errors"]
    yield _verdict(
        "every request is answered", "0 errors", f"{len(errors)}", not errors, "; ".join(errors[:3])
    )
    for crowd in soak["crowds"]:
        good = crowd["refused"] > 0 and crowd["answered"] == crowd["visitors"]
        figure = f"{crowd['answered']} of {crowd['visitors']} answered, {crowd['refused']} times refused"
        yield _verdict("a crowd is refused with Retry-After, then answered", "all, 1 or more", figure, good)


def _of_pace(soak: dict[str, Any], bounds: PromisesOf) -> Iterator[Verdict]:
    """Times, and that everything happened which the soak is to show."""
    p95 = soak["latency"]["reply_s"].get("p95")
    figure = f"{p95} s" if p95 is not None else "no reply"
    bound = f"p95 of whole replies under {bounds.reply_p95_s:g} s"
    quick = _verdict("a normal reply is quick", bound, figure, p95 is not None and p95 < bounds.reply_p95_s)
    yield _unless(quick, _short(soak, bounds))
    came, planned = len(soak["crowds"]), soak["planned_crowds"]
    yield _verdict("crowds came and went", f"{planned}", f"{came}", came == planned)
    words, twins, tokens = soak["words"], soak["twins"], soak["hits"]["tokens"]
    yield _found("sleeping agents were woken from disk", tokens["disk"], "tokens")
    yield _found("prefixes were found in memory", tokens["memory"], "tokens")
    yield _found("histories were compared after restarts", words["histories"], "histories")
    yield _found("twins of agents that slept through a restart", twins["slept"], "sessions")


def _of_memory(soak: dict[str, Any], bounds: PromisesOf) -> Iterator[Verdict]:
    for name, what in (("run", "the run"), ("longest_life", "the longest life of a server")):
        grown = soak["memory"][name]
        bound = f"under {bounds.growth_percent:g}%"
        if grown is None:
            yield Verdict(f"memory does not grow over {what}", bound, "", NOT_JUDGED, "too few samples")
            continue
        figure = f"{grown['percent']}% in {(grown['to_s'] - grown['from_s']) / 60:.0f} minutes"
        kept = grown["percent"] < bounds.growth_percent
        grew = _verdict(f"memory does not grow over {what}", bound, figure, kept)
        yield _unless(grew, _short(soak, bounds))
        if name == "longest_life":
            for noun, more in (("threads", bounds.threads_more), ("descriptors", bounds.descriptors_more)):
                before, after = grown[noun]
                figure = f"{before:g}, then {after:g}"
                yield _verdict(
                    f"{noun} do not pile up", f"at most {more} more", figure, after <= before + more
                )


def _of_bounds(samples: list[Sample], most_disk: int) -> Iterator[Verdict]:
    quota = min((sample.disk_quota for sample in samples), default=0)
    most = max([most_disk, *(max(s.disk_walked, s.disk_ledger) for s in samples)])
    figure = f"{most / 1e6:.0f} MB at most, in {len(samples)} samples"
    yield _verdict("the disk quota holds", f"{quota / 1e6:.0f} MB", figure, 0 < most <= quota)
    settled = [s for s in samples if s.is_calm and s.age >= _SETTLED_S]
    ill = [f"{s.at:.0f} s: {s.status} {s.reasons}" for s in settled if s.status != "ok"]
    yield _verdict(
        "health is ok but for crowds and restarts", "0 samples", f"{len(ill)}", not ill, "; ".join(ill[:3])
    )


def _of_words(soak: dict[str, Any]) -> Iterator[Verdict]:
    words, twins = soak["words"], soak["twins"]
    leaks = words["leaks"]
    figure = f"{len(leaks)}; own words said in {words['said']} of {words['asked']} replies"
    yield _verdict("no reply has another agent's word", "0", figure, not leaks, "; ".join(leaks[:3]))
    problems = soak["problems"]
    figure = (
        f"{len(problems)}; {words['histories']} histories after restarts, {words['continued']} replies asked "
        f"for again, {words['calls']} calls"
    )
    shown = "; ".join(problems[:3])
    yield _verdict(
        "histories, continuations and calls are as they must be", "0 problems", figure, not problems, shown
    )
    different = twins["different"]
    figure = (
        f"{len(different)} of {twins['turns']} replies in {twins['sessions']} sessions, of which "
        f"{twins['slept']} slept"
    )
    yield _verdict(
        "a twin that never slept says the same", "0 differ", figure, not different, "; ".join(different[:2])
    )


def _of_the_end(soak: dict[str, Any]) -> Iterator[Verdict]:
    end = soak["end"]
    left = {key: end[key] for key in ("running", "waiting", "pages_used")}
    yield _verdict("nothing is left in the engine", "0", str(left), not any(left.values()))
    stops = [life["exit_code"] for life in soak["lives"] if life["end"] == "sigterm"]
    yield _verdict("the server ends in order", "0", str(stops), bool(stops) and not any(stops))
    complaints = end["complaints"]
    shown = "; ".join(complaints[:3])
    yield _verdict("the log has no error", "0 lines", str(len(complaints)), not complaints, shown)
    yield _verdict("`store verify` is clean", "clean", end["verify"], end["verify"] == "clean")


def _verdict(promise: str, bound: str, figure: str, kept: bool, remark: str = "") -> Verdict:
    return Verdict(promise, bound, figure, KEPT if kept else BROKEN, remark)


def _found(promise: str, count: int, noun: str) -> Verdict:
    """A check of the soak itself: what it has to show was there to be shown."""
    return _verdict(promise, "1 or more", f"{count} {noun}", count > 0)
