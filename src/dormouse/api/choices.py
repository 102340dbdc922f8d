"""Several answers to one request: `n` of them, or one for each of several prompts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence

from dormouse.api.answer import Answer, Delta, End
from dormouse.api.ask import Ask
from dormouse.api.generation import Generation
from dormouse.api.services import Services
from dormouse.domain.errors import DormouseError
from dormouse.domain.requests import Usage
from dormouse.models.served import ServedModel

log = logging.getLogger(__name__)

_Event = tuple[int, Delta | End | DormouseError | None]


class Choices:
    """The generations of one request. The first begins at once; the others when it is complete, and so
    find the prompt that they share with it."""

    def __init__(
        self, services: Services, served: ServedModel, asks: Sequence[Ask], first: Generation
    ) -> None:
        """Use `begin`."""
        self.served = served
        self._services = services
        self._asks = asks
        self._open = {0: first}

    @classmethod
    async def begin(cls, services: Services, served: ServedModel, asks: Sequence[Ask]) -> Choices:
        """Submit the first of `asks`. Raises what `Generation.begin` raises."""
        return cls(services, served, asks, await Generation.begin(services, served, asks[0]))

    async def events(self) -> AsyncGenerator[tuple[int, Delta | End | None], None]:
        """Each choice's events with its index, None in a long silence. Raises a generation's error."""
        async for first in self._open[0].events():
            yield 0, first
        others = range(1, len(self._asks))
        if not others:
            return
        merged: asyncio.Queue[_Event] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(index, merged)) for index in others]
        try:
            num_open = len(tasks)
            while num_open:
                index, event = await merged.get()
                if isinstance(event, DormouseError):
                    raise event
                num_open -= isinstance(event, End)
                yield index, event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self) -> list[Answer]:
        """All choices in order. Raises a generation's error."""
        deltas: dict[int, list[Delta]] = {index: [] for index in range(len(self._asks))}
        ends: dict[int, End] = {}
        async with contextlib.aclosing(self.events()) as events:
            async for index, event in events:
                if isinstance(event, End):
                    ends[index] = event
                elif event is not None:
                    deltas[index].append(event)
        return [Answer(tuple(deltas[index]), ends[index]) for index in deltas]

    async def aclose(self) -> None:
        """Stop what is not complete."""
        for generation in self._open.values():
            await generation.aclose()

    async def _forward(self, index: int, merged: asyncio.Queue[_Event]) -> None:
        try:
            generation = await Generation.begin(self._services, self.served, self._asks[index])
            self._open[index] = generation
            async for event in generation.events():
                merged.put_nowait((index, event))
        except DormouseError as error:
            merged.put_nowait((index, error))
        except Exception:
            # Whoever reads `merged` waits for this choice's end.
            log.exception("choice %d failed", index)
            merged.put_nowait((index, DormouseError("internal error; see the server's log")))


def total(ends: Sequence[End], num_prompts: int) -> Usage:
    """What all choices used; a prompt that several share counts once, as its first choice found it."""
    per_prompt = len(ends) // num_prompts
    firsts = [end.usage for end in ends[::per_prompt]]
    return Usage(
        sum(used.prompt_tokens for used in firsts),
        sum(used.memory_tokens for used in firsts),
        sum(used.disk_tokens for used in firsts),
        sum(end.usage.completion_tokens for end in ends),
    )
