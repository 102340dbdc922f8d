"""The client: what it times, counts and gives up."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.compare.decode import tokens_per_s
from benchmarks.compare.mixed import gaps
from benchmarks.compare.peers import KVBudget, Launch
from benchmarks.compare.server import Server
from benchmarks.compare.traffic import Ask, Reply, RequestFailed, TookTooLong
from tests.benchmarks.conftest import fake_peer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(fake_peer("fake"), tmp_path_factory.mktemp("fake"), KVBudget(1, 1))
    server.start()
    assert server.absence is None
    yield server
    family = server.family()
    server.stop()
    assert not any(process.is_running() for process in family)


def test_a_reply_has_its_text_times_and_usage(server: Server) -> None:
    reply = server.client.complete(Ask("abc", 5, 20))
    assert reply.text == "ccccc"
    assert (reply.prompt_tokens, reply.completion_tokens) == (7, 5)
    assert len(reply.times) == 5
    assert 0 < reply.ttft_s < reply.times[-1] - reply.started


def test_a_refusal_says_what_was_answered(server: Server) -> None:
    with pytest.raises(RequestFailed, match="answered 400"):
        server.client.complete(Ask("refuse", 5, 20))


def test_a_request_has_a_limit(server: Server) -> None:
    with pytest.raises(TookTooLong, match=r"within 0\.1 s"):
        server.client.complete(Ask("abc", 1000, 0.1))


def test_a_stream_ends_when_it_is_told_to(server: Server) -> None:
    over = threading.Event()
    over.set()
    reply = server.client.complete(Ask("abc", 1000, 20, until=over))
    assert reply.completion_tokens <= 1


def test_streams_run_together(server: Server) -> None:
    # Two seconds of them: one may begin late.
    replies = server.client.together([Ask("a", 200, 60), Ask("b", 200, 60)])
    assert [reply.text for reply in replies] == ["a" * 200, "b" * 200]
    assert max(reply.times[0] for reply in replies) < min(reply.times[-1] for reply in replies)


def test_an_absent_server_says_why(tmp_path: Path) -> None:
    server = Server(fake_peer("fake", version=None), tmp_path, KVBudget(1, 1))
    server.start()
    assert server.absence == "not installed; see `make peers`"


def test_a_server_that_dies_at_once_says_its_last_line(tmp_path: Path) -> None:
    def launch(port: int, folder: Path, budget: KVBudget) -> Launch:
        del port, folder, budget
        return Launch([sys.executable, "-c", "raise SystemExit('no such model')"])

    server = Server(dataclasses.replace(fake_peer("fake"), launch=launch), tmp_path, KVBudget(1, 1))
    server.start()
    assert server.absence == "ended with 1 while starting: no such model"


def reply(*times: float, tokens: int | None = None) -> Reply:
    return Reply(0.0, times, times[-1], "x", 1, len(times) if tokens is None else tokens)


def test_speed_is_counted_while_all_streams_generate() -> None:
    assert tokens_per_s([reply(1, 2, 3, 4), reply(2, 3, 4, 5)]) == pytest.approx(2.0)


def test_speed_counts_tokens_not_pieces() -> None:
    assert tokens_per_s([reply(1, 2, 3, tokens=9)]) == pytest.approx(3.0)


def test_streams_that_are_never_together_count_from_first_to_last() -> None:
    assert tokens_per_s([reply(1, 2), reply(3, 4)]) == pytest.approx(1.0)


def test_the_longest_gap_is_that_around_the_long_prompt() -> None:
    step, gap = gaps([reply(0, 1, 2, 3, 8, 9, 10, 30)], arrived=3.5, ended=9.5)
    assert (step, gap) == (1, 5)
    with pytest.raises(RequestFailed, match="did not decode"):
        gaps([reply(5, 6)], arrived=3.5, ended=4)
