"""Whether sleep was invisible: conversations that lived through restarts, again where nobody ever slept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.client import Client, NotAnswered
from benchmarks.soak.session import Session

STATELESS = ("chat", "messages")
"""Dialects whose requests carry the whole conversation: they can be sent again as they were."""


@dataclass
class Twins:
    """What was compared; `different` has a sentence for each reply that is not the same."""

    sessions: int = 0
    turns: int = 0
    slept: int = 0
    """Sessions of these that went on after a restart of the server."""
    different: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    async def compare(self, client: Client, sessions: Sequence[Session]) -> None:
        """Have every turn of `sessions` answered again, in their order, and compare."""
        for session in sessions:
            self.sessions += 1
            self.slept += session.num_lives > 1
            for turn in session.turns:
                ask = session.ask(turn.max_tokens, calls=turn.calls, upto=turn.num_messages)
                try:
                    reply = await client.ask("twin", session.kind.dialect, ask)
                except NotAnswered as error:
                    self.different.append(f"{session.agent}: {error}")
                    break
                self.turns += 1
                arguments = tuple(call.arguments for call in reply.calls)
                if (reply.text, arguments) != (turn.text, turn.arguments):
                    self.different.append(
                        f"{session.agent}, reply {turn.num_messages}: {turn.text!r} {turn.arguments}, "
                        f"its twin: {reply.text!r} {arguments}"
                    )


def choose(sessions: Sequence[Session], number: int) -> list[Session]:
    """Those that tell most: who lived through most restarts first, as many of each kind as there are."""
    fit = [session for session in sessions if session.kind.dialect in STATELESS and session.turns]
    ordered = sorted(fit, key=lambda session: (-session.num_lives, session.agent))
    kinds: dict[str, int] = {}
    ranked = []
    for session in ordered:
        rank = kinds[session.kind.name] = kinds.get(session.kind.name, 0) + 1
        ranked.append((-session.num_lives, rank, session.agent, session))
    return [session for *_, session in sorted(ranked, key=lambda row: row[:3])][:number]
