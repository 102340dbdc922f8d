"""A step's computation, and what becomes of it when it raises."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from dormouse.domain.plan import Plan
from dormouse.engine.step import Step
from dormouse.runtimes.base import Logits, Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Computed:
    """A part of a step with its logits, or with the error that they could not be had for."""

    step: Step
    logits: Logits | None
    error: Exception | None = None
    seconds: float | None = None
    """What it took, where it is worth remembering."""


def compute(runtime: Runtime, step: Step) -> list[Computed]:
    """The step in one piece, or each of its chunks alone when that raises.

    A step that raised has changed nothing that counts: the rows that it was to write are written anew. And no
    chunk depends on the others. So an error costs only those who cannot be computed alone either, and one
    that does not come again (memory that was short for a moment, or for all at once) costs nobody anything.
    """
    begun = time.monotonic()
    try:
        logits = runtime.forward(step.plan)
    except Exception as error:
        log.error("a step of %d sequences raised; each is tried alone", len(step.sequences), exc_info=error)
    else:
        return [Computed(step, logits, seconds=time.monotonic() - begun)]
    return [_alone(runtime, part) for part in _parts(step)]


def _alone(runtime: Runtime, part: Step) -> Computed:
    try:
        return Computed(part, runtime.forward(part.plan))
    except Exception as error:
        log.error("request %s cannot be computed", part.sequences[0].request.id, exc_info=error)
        return Computed(part, None, error)


def _parts(step: Step) -> list[Step]:
    chunks = zip(step.sequences, step.plan.chunks, step.drafts, strict=True)
    return [
        replace(step, plan=Plan((chunk,)), sequences=(sequence,), drafts=(draft,))
        for sequence, chunk, draft in chunks
    ]
