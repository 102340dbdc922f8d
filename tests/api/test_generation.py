"""What holds for a reply in any dialect."""

from __future__ import annotations

import pytest
from tests.api.conftest import Service

from dormouse.api import generation
from dormouse.domain.conversation import Piece
from dormouse.models.chat import ChatModel


class Silent:
    """A parser that keeps everything to itself, as one does within a call."""

    def push(self, text: str) -> list[Piece]:
        del text
        return []

    def finish(self) -> list[Piece]:
        return []


def test_a_stream_shows_life_while_a_call_is_generated(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatModel, "reply_parser", lambda *_: Silent())
    monkeypatch.setattr(generation, "PING_INTERVAL_S", 0.0)
    assert service.chat(stream=True).text.count(": ping") >= 4
