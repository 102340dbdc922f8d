"""What an engine may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of the engine. Times are in seconds, `token_budget` in prefill tokens a step.

    With `speculate` steps compute guessed tokens too, where that is likely to gain time.

    With `sync` a reply's end is answered only when its blocks and history are on disk, or when
    `sync_timeout_s` has passed.
    """

    token_budget: int = 512
    max_running: int = 64
    max_queue: int = 256
    load_timeout_s: float = 10.0
    speculate: bool = True
    sync: bool = False
    sync_timeout_s: float = 30.0

    @property
    def answer_s(self) -> float:
        """So long after its last token may a reply's end be answered."""
        return self.sync_timeout_s if self.sync else 0.0
