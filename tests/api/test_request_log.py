"""Log lines: one per request, with what an operator asks for, and with no secret."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.api.conftest import Service, serving
from tests.engine.harness import WAIT_S, GatedRuntime

from dormouse.api.edge import Edge
from dormouse.api.keys import KeyFile, KeyRing
from dormouse.api.rate_limits import RateLimits
from dormouse.api.request_id import AddRequestId
from dormouse.cli.logs import CHATTY, JsonFormatter
from dormouse.domain.plan import Plan
from dormouse.models.chat import ChatModel
from dormouse.runtimes.base import Logits
from dormouse.runtimes.fake import FakeRuntime

REQUESTS = "dormouse.api.request_log"
SECRET = "what nobody but the model may read"


class Lines(logging.Handler):
    """Keeps lines as `--log-format json` prints them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.addFilter(AddRequestId())
        self.text: list[str] = []
        self._ended = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(self.format(record))
        if record.name == REQUESTS:
            self._ended.release()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text]

    def requests(self, count: int) -> list[dict[str, Any]]:
        """The lines of the first `count` requests; a client has its answer before its line is written."""
        for _ in range(count):
            assert self._ended.acquire(timeout=WAIT_S)
        lines = [line for line in self.all() if line["logger"] == REQUESTS]
        assert len(lines) == count
        return lines


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Everything that any logger says."""
    handler, root = Lines(), logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("", *CHATTY)}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # The client of the tests is no part of the server.
    logging.getLogger("httpcore").propagate = False
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    logging.getLogger("httpcore").propagate = True
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_line_has_who_what_and_how_long(service: Service, lines: Lines) -> None:
    service.http.headers["x-request-id"] = "mine-1"
    usage = service.chat(SECRET * 2, prompt_cache_key="me").json()["usage"]
    (line,) = lines.requests(1)
    durations = {name: line.pop(name) for name in list(line) if name.endswith("_s")}
    del line["time"], line["message"]
    assert line.pop("reply").startswith("chatcmpl-")
    assert line == {
        "level": "info",
        "logger": "dormouse.api.request_log",
        "request_id": "mine-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "dialect": "openai",
        "tenant": "default",
        "model": "fake",
        "agent": "me",
        "outcome": "length",
        "prompt_tokens": usage["prompt_tokens"],
        "computed_tokens": usage["prompt_tokens"],
        "memory_tokens": 0,
        "disk_tokens": 0,
        "generated_tokens": 8,
    }
    phases = ("queued_s", "wake_s", "prefill_s", "decode_s")
    assert durations.keys() == {"duration_s", "first_text_s", *phases}
    assert all(seconds >= 0 for seconds in durations.values())
    assert sum(durations[name] for name in phases) <= durations["duration_s"]


def test_a_stream_has_a_line_when_it_has_ended(service: Service, lines: Lines) -> None:
    service.chat(stream=True)
    (line,) = lines.requests(1)
    assert (line["status"], line["generated_tokens"]) == (200, 8)


def test_several_answers_are_added_up(service: Service, lines: Lines) -> None:
    service.chat(n=3, temperature=1, prompt_cache_key="me")
    (line,) = lines.requests(1)
    assert (line["replies"], line["generated_tokens"], line["agent"]) == (3, 24, "me")
    assert line["memory_tokens"] > 0, "the second and third found the prompt of the first"


def test_a_refused_caller_is_named_if_its_key_is_known(tmp_path: Path, lines: Lines) -> None:
    (tmp_path / "data").mkdir()
    key = KeyFile(tmp_path / "data").add("a")
    edge = Edge(keys=KeyRing(tmp_path / "data"), limits=RateLimits(requests_per_minute=1))
    with serving(tmp_path, FakeRuntime(64), edge) as service:
        service.chat()
        service.http.headers["x-api-key"] = key
        for path in ("/metrics", "/v1/models", "/v1/models"):
            service.http.get(path)
    found = [(line["status"], line.get("tenant"), "key" in line) for line in lines.requests(4)]
    assert found == [(401, None, False), (403, "a", True), (200, "a", True), (429, "a", True)]


def test_probes_are_quiet(service: Service, lines: Lines) -> None:
    service.http.get("/health")
    service.http.get("/metrics")
    assert [line["level"] for line in lines.requests(2)] == ["debug", "debug"]


def test_refusals_and_failures_have_lines(service: Service, lines: Lines) -> None:
    service.http.get("/v1/agents/nobody")
    service.chat(n=99)
    line, other = lines.requests(2)
    assert (line["route"], line["status"], line["tenant"]) == ("/v1/agents/{name:path}", 404, "default")
    assert (other["status"], "outcome" in other) == (400, False)


def test_what_the_engine_does_not_take_in_is_refused_and_not_aborted(service: Service, lines: Lines) -> None:
    said = [{"role": "user", "content": "word " * 4_000}]
    answer = service.http.post("/v1/chat/completions", json={"model": "fake", "messages": said})
    assert answer.status_code == 400
    (line,) = lines.requests(1)
    assert (line["outcome"], line["error"]) == ("refused", "context_length_exceeded")


class Dying(FakeRuntime):
    def forward(self, plan: Plan) -> Logits:
        raise MemoryError(f"no room for {plan.num_tokens} tokens")


@pytest.mark.parametrize("runtime", [Dying], indirect=True)
def test_a_reply_that_fails_has_its_code(service: Service, lines: Lines) -> None:
    service.chat()
    (line,) = lines.requests(1)
    assert (line["status"], line["outcome"], line["error"]) == (500, "failed", "step_failed")


@pytest.mark.parametrize("runtime", [GatedRuntime], indirect=True)
def test_a_reply_that_is_given_up_says_so(service: Service, runtime: FakeRuntime, lines: Lines) -> None:
    assert isinstance(runtime, GatedRuntime)
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with service.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        runtime.allow.release()
        next(answer.iter_lines())
    runtime.run_freely()
    service.chat()
    aborted, whole = sorted(lines.requests(2), key=lambda line: line["outcome"])
    assert (aborted["outcome"], "generated_tokens" in aborted) == ("aborted", False)
    assert whole["outcome"] == "length"


def test_secrets_are_in_no_line(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> list[int]:
        raise RuntimeError("a bug")

    (tmp_path / "data").mkdir()
    file = KeyFile(tmp_path / "data")
    key, revoked = file.add("a"), file.add("b")
    file.revoke(file.all()[1].id)
    with serving(tmp_path, FakeRuntime(64), Edge(keys=KeyRing(tmp_path / "data"))) as service:
        for headers in (
            {"x-api-key": key},
            {"authorization": f"Bearer {revoked}"},
            {"x-api-key": SECRET},
            {"x-api-key": key, "cookie": SECRET, "x-request-id": SECRET},
        ):
            service.http.headers.clear()
            service.http.headers.update(headers)
            reply = service.chat(SECRET)
            service.chat(SECRET, n=3)
            service.http.post("/v1/chat/completions", content=SECRET)
            service.http.get("/v1/models", params={"q": SECRET})
        with monkeypatch.context() as patch:
            patch.setattr(ChatModel, "render_conversation", broken)
            service.chat(SECRET)
    requests = lines.requests(17)
    said = reply.json()["choices"][0]["message"]["content"]
    for secret in (SECRET, key, revoked, key[12:], revoked[12:], said):
        assert not any(secret in line for line in lines.text)
    assert {line.get("key") for line in requests} == {None, file.all()[0].id}


def test_every_line_of_a_request_has_its_id(
    service: Service, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(*_: object, **__: object) -> list[int]:
        logging.getLogger("anything").warning("from a thread")
        raise RuntimeError("a bug")

    monkeypatch.setattr(ChatModel, "render_conversation", talkative)
    service.http.headers["x-request-id"] = "mine-2"
    assert service.chat().status_code == 500
    lines.requests(1)
    mine = [line for line in lines.all() if line.get("request_id") == "mine-2"]
    assert {"anything", "dormouse.api.errors", REQUESTS} <= {line["logger"] for line in mine}
    (failure,) = [line for line in mine if "exception" in line]
    assert "RuntimeError: a bug" in failure["exception"]
    logging.getLogger("anything").warning("outside")
    assert "request_id" not in lines.all()[-1]
