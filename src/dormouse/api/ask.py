"""What a dialect asks for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dormouse.api.call import Call
from dormouse.api.identity import Identity
from dormouse.domain.conversation import Conversation
from dormouse.domain.requests import SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation, or the tokens of a plain prompt. `max_tokens` None is as many
    as there is room for. `id` is the reply's as its client sees it, `call` the HTTP request that is watched
    from outside, None for one that nobody sent."""

    id: str
    source: Conversation | tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None
    identity: Identity
    tenant: str
    call: Call | None = None

    def others(self, samplings: Sequence[SamplingParams]) -> list[Ask]:
        """The same, asked again; only the first of several answers is the agent's."""
        nobody = replace(self.identity, agent=None)
        return [
            replace(self, id=uuid.uuid4().hex, sampling=sampling, identity=nobody) for sampling in samplings
        ]
