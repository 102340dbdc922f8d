"""Shim until the parsers come."""

from __future__ import annotations

from typing import Protocol

from dormouse.domain.conversation import Piece, Said


class ReplyParser(Protocol):
    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class Plain:
    def push(self, text: str) -> list[Piece]:
        return [Said(text)] if text else []

    def finish(self) -> list[Piece]:
        return []
