"""What happens to the server during a run: restarts, and crowds that it cannot all serve at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from benchmarks.soak.client import NotAnswered
from benchmarks.soak.dialects import Ask
from benchmarks.soak.mix import What
from benchmarks.soak.replies import Outcome
from benchmarks.soak.world import World
from dormouse.domain.conversation import Message, Role

_CROWD = "crowd"
_SAYS = 24
_HEARS = 16
_DIALECTS = ("chat", "messages", "responses")
_ANCHOR = "anchor"


@dataclass
class Moments:
    """The moments of a run, in their order; `crowds` has what became of each crowd."""

    world: World
    crowds: list[dict[str, Any]]

    async def run(self) -> None:
        """All of them, each at its time."""
        host = self.world.client.host
        for number, moment in enumerate(self.world.mix.moments):
            await asyncio.sleep(max(0.0, moment.at * self.world.seconds - host.now))
            if moment.what is What.CROWD:
                await self._crowd(number)
                continue
            if moment.what is What.SIGKILL:
                await self._until_written()
            await host.restart(moment.what)

    async def _until_written(self) -> None:
        """All that was told before is on disk: what is made here is answered when it is, and comes after it.

        A reply is saved some moments after it is told, and a kill may cost it until then. That it costs no
        more is for `make torture` to show.
        """
        await self.world.call("POST", "/v1/agents", {"name": _ANCHOR})
        await self.world.call("DELETE", f"/v1/agents/{_ANCHOR}")

    async def _crowd(self, number: int) -> None:
        """Everybody at once. Who is refused comes back when told to, until all are answered."""
        client, size = self.world.client, self.world.mix.run.crowd
        before, began = len(client.attempts), client.host.now
        client.num_crowds += 1
        try:
            answers = [self._visit(number, visitor) for visitor in range(size)]
            answered = sum(await asyncio.gather(*answers))
        finally:
            client.num_crowds -= 1
            client.last_crowd_end = client.host.now
        mine = [attempt for attempt in client.attempts[before:] if attempt.kind == _CROWD]
        refused = sum(attempt.outcome is Outcome.REFUSED for attempt in mine)
        self.crowds.append(
            {
                "at": round(began, 1),
                "seconds": round(client.host.now - began, 1),
                "visitors": size,
                "answered": answered,
                "refused": refused,
            }
        )

    async def _visit(self, number: int, visitor: int) -> bool:
        name = f"{_CROWD}{number}-{visitor}"
        chance = self.world.chance(name)
        said = [Message(Role.USER, f"I am {name}. {self.world.words.piece(chance, _SAYS)}")]
        ask = Ask(name, "Answer in one sentence.", said, said, _HEARS)
        try:
            reply = await self.world.client.ask(_CROWD, _DIALECTS[visitor % len(_DIALECTS)], ask)
        except NotAnswered:
            return False
        self.world.canaries.look(name, reply.text, asked=False)
        return True
