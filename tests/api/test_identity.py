"""Whose request it is: every client's way to say it, in their order."""

from __future__ import annotations

import json

import pytest

from dormouse.api.identity import Hints, identify
from dormouse.domain.errors import InvalidRequest
from dormouse.domain.requests import Priority

CLAUDE = {"x-claude-code-session-id": "s"}


@pytest.mark.parametrize(
    ("headers", "hints", "agent"),
    [
        ({}, Hints(), None),
        ({"x-agent-id": "me"}, Hints(prompt_cache_key="key"), "me"),
        (CLAUDE, Hints(has_tools=True), "claude-code/s"),
        (CLAUDE, Hints(), "claude-code/s/side"),
        (CLAUDE | {"x-claude-code-agent-id": "a"}, Hints(has_tools=True), "claude-code/s/a"),
        ({}, Hints(True, metadata_user_id=json.dumps({"session_id": "s"})), "claude-code/s"),
        ({}, Hints(True, metadata_user_id="user_0a_account__session_12-ab"), "claude-code/12-ab"),
        ({}, Hints(metadata_user_id="somebody"), "somebody"),
        ({"session-id": "s", "thread-id": "t"}, Hints(has_tools=True, prompt_cache_key="k"), "codex/t"),
        ({"session_id": "s"}, Hints(has_tools=True), "codex/s"),
        ({}, Hints(True, client_metadata={"thread_id": "t"}), "codex/t"),
        ({"x-session-affinity": "o"}, Hints(prompt_cache_key="k"), "opencode/o"),
        ({"x-openwebui-chat-id": "c"}, Hints(), "openwebui/c"),
        ({}, Hints(prompt_cache_key="k", user="u"), "k"),
        ({}, Hints(user="u"), "u"),
    ],
)
def test_names_are_found_in_order(headers: dict[str, str], hints: Hints, agent: str | None) -> None:
    assert identify(headers, hints).agent == agent


def test_auxiliary_requests_are_side_requests() -> None:
    headers = CLAUDE | {"x-claude-code-request-class": "auxiliary"}
    assert identify(headers, Hints()).priority is Priority.SIDE
    assert identify(CLAUDE, Hints(has_tools=True)).priority is Priority.MAIN


def test_only_a_name_meant_as_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="control characters"):
        identify({"x-agent-id": "a\tb"}, Hints())
    one, other = (identify({}, Hints(prompt_cache_key=text)).agent for text in ("x" * 300, "x" * 301))
    assert one != other
