"""A model that is being served: its chat side and its engine under one name."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.engine.engine import Engine
from dormouse.models.chat import ChatModel
from dormouse.models.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`created` is in Unix seconds, `deadline_s` bounds each request from its submission. `folder` is where
    it was loaded from, None for a model that has no files."""

    name: str
    created: int
    chat: ChatModel
    engine: Engine
    deadline_s: float
    folder: ModelFolder | None = None

    @property
    def fingerprint(self) -> str:
        """A short name of the exact weights, config and tokenizer."""
        return f"fp_{self.engine.runtime.spec.fingerprint[:12]}"

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.engine.runtime.spec.vocab_size
