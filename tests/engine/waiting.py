"""Sequences that only wait."""

from __future__ import annotations

from dormouse.domain.blocks import Namespace
from dormouse.domain.requests import Event, Priority, Request, SamplingParams
from dormouse.engine.detokenizer import Detokenizer
from dormouse.engine.sampler import Sampler
from dormouse.engine.sequence import Sequence
from dormouse.runtimes.fake import ByteDecoder


def waiting(
    name: str,
    *,
    tenant: str = "default",
    agent: str | None = None,
    priority: Priority = Priority.MAIN,
    prompt: tuple[int, ...] = (1, 2, 3),
) -> Sequence:
    """A sequence as the engine loop makes it."""
    params = SamplingParams(temperature=0)
    request = Request(name, prompt, params, _ignore, agent, tenant, priority=priority)
    return Sequence(
        request=request,
        namespace=Namespace(b"n" * 16),
        block_size=16,
        tokens=list(prompt),
        max_length=100,
        deadline=0.0,
        sampler=Sampler(params, prompt, frozenset()),
        detokenizer=Detokenizer(ByteDecoder(), ()),
    )


def _ignore(event: Event) -> None:
    del event
