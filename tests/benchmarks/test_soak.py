"""The soak's own checks: what they are to find they find, and a page says what was and was not run."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.soak import figures, page
from benchmarks.soak.client import Client, NotAnswered
from benchmarks.soak.dialects import DIALECTS, Ask
from benchmarks.soak.host import Host
from benchmarks.soak.mix import Kind, Mix, Shape
from benchmarks.soak.promises import BROKEN, KEPT, NOT_JUDGED, Verdict, verdicts
from benchmarks.soak.replies import Attempt, Outcome, Reply
from benchmarks.soak.samples import Sample, walk
from benchmarks.soak.session import Session
from benchmarks.soak.twins import choose
from benchmarks.soak.words import Canaries, Words

from dormouse.domain.conversation import Message, Role, Tool, ToolCall

MIX = Mix.load()
SAMPLE = Sample(
    at=100.0, life=1, age=100.0, is_calm=True, resident=500.0, anonymous=400.0, file_backed=100.0,
    arena_touched=150.0, threads=13, descriptors=20, disk_walked=1000, disk_ledger=1000, disk_quota=2000,
    tokens={"memory": 50, "disk": 30, "computed": 20, "generated": 9}, running=0, waiting=0, preemptions=0,
    evicted_blocks=0, status="ok", reasons=[], others_percent=1.0,
)  # fmt: skip


def samples_of(**changes: Any) -> list[Sample]:
    """A run of 40 minutes, a sample a minute; `changes` are of the last ten of them."""
    steady = [dataclasses.replace(SAMPLE, at=60.0 * n, age=60.0 * n) for n in range(1, 41)]
    return steady[:30] + [dataclasses.replace(sample, **changes) for sample in steady[30:]]


def attempts() -> list[Attempt]:
    made = Attempt("talker-chat", "a", "chat", 5.0, 32, outcome=Outcome.OK, first_s=0.1, total_s=0.5)
    made.gaps_ms, made.prompt_tokens, made.cached_tokens = [5.0, 6.0], 100, 80
    return [
        made,
        dataclasses.replace(made, in_crowd=True, total_s=9.0),
        dataclasses.replace(made, kind="twin"),
    ]


def soak_of(samples: list[Sample]) -> dict[str, Any]:
    """A document in which every promise was kept, but for what `samples` show."""
    return {
        "planned_minutes": 40.0, "minutes": 40.0, "interrupted": False, "failure": "", "seed": 1,
        "reply_tokens": 32, "requests": 3, "sessions": 1, "problems": [], "errors": [],
        "outcomes": figures.outcomes(attempts()),
        "crowds": [{"at": 60.0, "seconds": 5.0, "visitors": 60, "answered": 60, "refused": 4}],
        "planned_crowds": 1,
        "latency": figures.latencies(attempts(), 32),
        "hits": figures.hits(samples, attempts()),
        "memory": figures.memory(samples, 2400, 60),
        "lives": [{"began": 0.0, "ready_s": 3.0, "ended": 2400.0, "end": "sigterm", "exit_code": 0}],
        "words": {"asked": 5, "said": 4, "leaks": [], "histories": 2, "continued": 3, "calls": 9},
        "twins": {"sessions": 2, "turns": 9, "slept": 1, "different": []},
        "end": {"running": 0, "waiting": 0, "pages_used": 0, "verify": "clean", "complaints": []},
        "machine": {"cores": 2, "cpu": "c", "memory_gib": 1, "time": "2026-01-02T03:04:05", "commit": "abc"},
        "minutes_of_replies": figures.by_minute(attempts(), 32),
        "samples": figures.thinned(samples),
    }  # fmt: skip


def judge(soak: dict[str, Any], samples: list[Sample]) -> list[Verdict]:
    return verdicts(soak, samples, 1000, MIX.promises)


def test_all_is_kept_where_all_is_well() -> None:
    samples = samples_of()
    assert {verdict.state for verdict in judge(soak_of(samples), samples)} == {KEPT}


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(soak: dict[str, Any]) -> None:
        place: Any = soak
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (put("errors", value=["500"]), "every request"),
        (put("crowds", 0, "refused", value=0), "a crowd"),
        (put("crowds", 0, "answered", value=59), "a crowd"),
        (put("latency", "reply_s", "p95", value=2.1), "a normal reply"),
        (put("latency", "reply_s", value={}), "a normal reply"),
        (put("planned_crowds", value=2), "crowds came"),
        (put("hits", "tokens", "disk", value=0), "sleeping agents"),
        (put("hits", "tokens", "memory", value=0), "prefixes"),
        (put("words", "leaks", value=["a has b's"]), "no reply has"),
        (put("words", "histories", value=0), "histories were"),
        (put("problems", value=["history"]), "histories, "),
        (put("twins", "different", value=["a"]), "a twin"),
        (put("twins", "slept", value=0), "twins of"),
        (put("end", "running", value=1), "nothing is left"),
        (put("end", "complaints", value=["ERROR"]), "the log"),
        (put("end", "verify", value="damaged"), "`store verify`"),
        (put("lives", 0, "exit_code", value=1), "the server ends"),
        (put("lives", value=[]), "the server ends"),
    ],
)
def test_a_broken_promise_is_found(change: Callable[[dict[str, Any]], None], promise: str) -> None:
    samples = samples_of()
    soak = soak_of(samples)
    change(soak)
    (broken,) = [verdict for verdict in judge(soak, samples) if verdict.state == BROKEN]
    assert broken.promise.startswith(promise)


@pytest.mark.parametrize(
    ("changes", "promises"),
    [
        (
            {"resident": 526.0},
            {"memory does not grow over the run", "memory does not grow over the longest life of a server"},
        ),
        ({"threads": 22}, {"threads do not pile up"}),
        ({"descriptors": 40}, {"descriptors do not pile up"}),
        ({"disk_walked": 2001}, {"the disk quota holds"}),
        ({"disk_ledger": 2001}, {"the disk quota holds"}),
        ({"status": "degraded", "reasons": ["disk_full"]}, {"health is ok but for crowds and restarts"}),
        ({"status": "degraded", "is_calm": False}, set()),
    ],
)
def test_samples_break_promises(changes: dict[str, Any], promises: set[str]) -> None:
    samples = samples_of(**changes)
    found = judge(soak_of(samples), samples)
    assert {verdict.promise for verdict in found if verdict.state == BROKEN} == promises


def test_times_on_a_busy_machine_are_told_and_not_judged() -> None:
    samples = [dataclasses.replace(sample, others_percent=40.0) for sample in samples_of()]
    soak = soak_of(samples)
    put("latency", "reply_s", "p95", value=9.0)(soak)
    (verdict,) = [verdict for verdict in judge(soak, samples) if verdict.promise == "a normal reply is quick"]
    assert (verdict.state, verdict.figure) == (NOT_JUDGED, "9.0 s")


def test_times_and_memory_of_a_short_run_are_told_and_not_judged() -> None:
    samples = samples_of(resident=600.0)
    soak = soak_of(samples) | {"minutes": 3.0, "errors": ["500"]}
    put("latency", "reply_s", "p95", value=9.0)(soak)
    found = judge(soak, samples)
    told = {verdict.promise for verdict in found if verdict.state == NOT_JUDGED}
    assert told == {
        "a normal reply is quick",
        "memory does not grow over the run",
        "memory does not grow over the longest life of a server",
    }
    assert [verdict.promise for verdict in found if verdict.state == BROKEN] == ["every request is answered"]


def test_what_an_interrupted_run_did_not_get_to_is_not_judged() -> None:
    samples = samples_of()
    soak = soak_of(samples) | {"interrupted": True, "planned_crowds": 2, "errors": ["500"]}
    put("end", "verify", value="not run")(soak)
    states = {verdict.promise: verdict.state for verdict in judge(soak, samples)}
    assert states["`store verify` is clean"] == states["crowds came and went"] == NOT_JUDGED
    assert states["every request is answered"] == BROKEN


def test_memory_counts_warm_servers_only() -> None:
    young = dataclasses.replace(SAMPLE, at=2300.0, life=2, age=30.0, resident=900.0)
    found = figures.memory([*samples_of(), young], 2400, 60)
    assert found["run"]["percent"] == found["longest_life"]["percent"] == 0.0
    assert figures.memory([young], 2400, 60)["run"] is None


def test_a_quiet_moment_is_what_latency_is_of() -> None:
    found = figures.latencies(attempts(), 32)
    assert found["reply_s"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5, "n": 1}
    assert found["first_token_s_in_a_crowd"]["n"] == 1
    assert figures.hits(samples_of(), attempts())["disk_percent"] == 30.0


def test_a_word_of_another_is_a_leak() -> None:
    canaries = Canaries()
    mine, other = (canaries.new(random.Random(n), name) for n, name in enumerate(("mine", "other")))
    canaries.look("mine", f"The word is {mine}.", asked=True)
    canaries.look("mine", "I forgot.", asked=True)
    assert (canaries.asked, canaries.said, canaries.leaks) == (2, 1, [])
    canaries.look("mine", f"It was ({other})", asked=False)
    assert canaries.leaks == ["a reply to mine has the word of other"]


def test_pieces_are_the_same_for_a_seed() -> None:
    words = Words()
    first, again = (words.piece(random.Random(7), 50) for _ in range(2))
    assert first == again
    assert 100 < len(first) < 200


def test_the_mix_is_what_its_words_say() -> None:
    shapes = {kind.shape for kind in MIX.kinds}
    assert shapes == set(Shape)
    assert {kind.dialect for kind in MIX.kinds} == set(DIALECTS)
    assert MIX.run.crowd > MIX.server.max_running + MIX.server.max_queue


def session_of(dialect: str, *lives: int) -> Session:
    kind = Kind(f"k-{dialect}", Shape.TALKER, dialect, 1, 1.0, (1, 2), 100)
    session = Session(kind, f"{dialect}{lives}", "f", "c", "s")
    for life in lives:
        session.messages.append(Message(Role.USER, "hm"))
        session.heard(Reply("yes", id="r1"), session.ask(32), life)
    return session


def test_twins_are_of_those_who_slept_longest() -> None:
    sessions = [
        session_of("chat", 1, 1),
        session_of("chat", 1, 2, 3),
        session_of("messages", 1, 2),
        session_of("agents", 1, 2, 3),
    ]
    chosen = choose(sessions, 2)
    assert [session.kind.dialect for session in chosen] == ["chat", "messages"]
    assert chosen[0].num_lives == 3


def test_a_turn_can_be_asked_for_again() -> None:
    session = session_of("responses", 1, 1)
    session.messages.append(Message(Role.USER, "last"))
    ask = session.ask(32)
    assert [message.text for message in ask.new] == ["last"]
    assert ask.after == "r1"
    assert len(session.ask(32, upto=session.turns[1].num_messages).messages) == 3


def test_calls_and_results_are_sent_in_each_dialects_form() -> None:
    call = ToolCall("c1", "read_file", '{"path": "README.md"}')
    said = [
        Message(Role.USER, "look"),
        Message(Role.ASSISTANT, calls=(call,)),
        Message(Role.TOOL, "text", call_id="c1", name="read_file"),
    ]
    ask = Ask("a", "system", said, said, 32, (Tool("read_file"),), calls=True)
    chat, messages = DIALECTS["chat"].body(ask), DIALECTS["messages"].body(ask)
    assert (chat["tool_choice"], messages["tool_choice"]) == ("required", {"type": "any"})
    assert chat["messages"][2]["tool_calls"][0]["function"]["arguments"] == call.arguments
    assert chat["messages"][3] == {"role": "tool", "content": "text", "tool_call_id": "c1"}
    assert messages["messages"][1]["content"][0]["input"] == {"path": "README.md"}
    assert messages["messages"][2]["content"][0]["tool_use_id"] == "c1"


Answer = tuple[int, dict[str, str], str]
"""Status, headers and body."""


def client_of(tmp_path: Path, *answers: Answer) -> Client:
    """A client whose server gives these answers, one after the other."""
    left = [httpx.Response(status, headers=headers, text=text) for status, headers, text in answers]
    host = Host(tmp_path, [], tmp_path / "log", url="http://server")
    host._up.set()
    return Client(host, httpx.AsyncClient(transport=httpx.MockTransport(lambda _: left.pop(0))))


BUSY: Answer = (429, {"retry-after": "0"}, "")
GOOD: Answer = (
    200,
    {},
    'data: {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}\n\n'
    'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, '
    '"prompt_tokens_details": {"cached_tokens": 8}}}\n\ndata: [DONE]\n\n',
)
CUT: Answer = (200, {}, 'data: {"choices": [{"delta": {"content": "y"}, "finish_reason": null}]}\n\n')


@pytest.mark.parametrize(
    ("answers", "crowds", "outcomes"),
    [
        ([GOOD], 0, ["ok"]),
        ([BUSY, GOOD], 1, ["refused", "ok"]),
        ([BUSY], 0, ["error"]),
        ([(429, {}, "")], 1, ["error"]),
        ([(503, {"retry-after": "1"}, "")], 1, ["error"]),
        ([(500, {}, "")], 0, ["error"]),
        ([CUT], 0, ["error"]),
    ],
)
def test_only_a_crowd_may_be_refused(
    tmp_path: Path, answers: list[Answer], crowds: int, outcomes: list[str]
) -> None:
    asyncio.run(_ask_and_see(tmp_path, answers, crowds, outcomes))


async def _ask_and_see(tmp_path: Path, answers: list[Answer], crowds: int, outcomes: list[str]) -> None:
    client = client_of(tmp_path, *answers)
    client.num_crowds = crowds
    ask = Ask("a", "system", [Message(Role.USER, "hm")], [], 32)
    try:
        assert (await client.ask("kind", "chat", ask)).cached_tokens == 8
    except NotAnswered:
        assert outcomes[-1] == "error"
    await client.http.aclose()
    assert [attempt.outcome.value for attempt in client.attempts] == outcomes


def test_a_page_says_what_was_and_was_not_run(tmp_path: Path) -> None:
    assert "No run is on record" in page.render(None, "")
    samples = samples_of()
    soak = soak_of(samples)
    soak["promises"] = [verdict.as_json() for verdict in judge(soak, samples)]
    text = page.render(copy.deepcopy(soak), "")
    assert "commit abc" in text
    assert f"{len(soak['promises'])} kept." in text
    page.write_charts(soak, tmp_path / page.IMAGES)
    for image in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (tmp_path / image).stat().st_size > 1000


def test_a_walk_counts_all_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"4567")
    assert walk(tmp_path) == 7
