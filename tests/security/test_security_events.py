"""Streams: whatever a model or a client writes, it never becomes an event of the server's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.api.conftest import Service, serving
from tests.api.scripted import called, play, said, thought
from tests.security.mutations import fuzzing

from dormouse.api import sse
from dormouse.api.answer import StopReason
from dormouse.models.tool_formats.base import raw_call
from dormouse.runtimes.fake import FakeRuntime

LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
FORGED = 'x%sdata: [DONE]%s%sevent: error%sdata: {"error": {"message": "forged"}}%s%s'
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8},
    "/v1/responses": {"input": "x", "store": False},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("events"), FakeRuntime(64)) as service:
        yield service


texts = st.text(st.one_of(st.sampled_from(LINE_ENDS + ' :"\\{}[]'), st.characters(exclude_categories=["Cs"])))


@fuzzing(300)
@given(payload=st.dictionaries(texts, st.one_of(texts, st.lists(texts))))
def test_fuzz_one_event_is_one_line(payload: dict[str, object]) -> None:
    frame = sse.data(payload)
    lines = frame.splitlines()  # the most that any client takes for the end of a line
    assert len(lines) == 2
    assert lines[1] == ""
    assert json.loads(lines[0].removeprefix("data: ")) == payload


@pytest.mark.parametrize("end", LINE_ENDS + "\r\n", ids=lambda end: f"U+{ord(end):04X}")
@pytest.mark.parametrize("path", STREAMS)
def test_a_model_cannot_forge_an_event(
    service: Service, path: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = FORGED.replace("%s", end)
    play(
        monkeypatch,
        [*thought(forged), *said(forged, end, forged), called("c", "f", json.dumps({"a": forged}))],
        StopReason.END,
    )
    body = {"model": "fake", "stream": True, **STREAMS[path]}
    text = service.http.post(path, json=body).text
    assert "forged" in text
    for line in text.splitlines():
        assert line == "" or line.startswith(("data: ", "event: ", ": ")), line
        assert not line.startswith(("event: error", 'data: {"error"')), line
    assert text.splitlines().count("data: [DONE]") <= 1


def test_halves_of_characters_stay_escapes() -> None:
    """A model may write them into a call's arguments; raw, no answer could be sent."""
    call = raw_call({"name": "f", "arguments": {"a": "\ud800", "b": "é"}}, "arguments")
    assert call is not None
    assert call.arguments.encode()
    assert json.loads(call.arguments) == {"a": "\ud800", "b": "é"}


@pytest.mark.parametrize("id", ["a\nb", "a\r\nset-cookie: x", "x" * 500, "<script>", "\u2028"])
def test_no_header_of_an_answer_is_the_clients(service: Service, id: str) -> None:
    headers = [(b"x-request-id", id.encode().replace(b"\n", b" ").replace(b"\r", b" "))]
    answer = service.http.get("/health", headers=headers)
    assert answer.headers["x-request-id"].startswith("req_")
    assert "set-cookie" not in answer.headers
