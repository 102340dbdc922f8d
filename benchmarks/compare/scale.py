"""How much is measured: sizes, rounds and limits of time, all of which go into the rows' files."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.compare.peers import BF16_TOKEN_NBYTES, CONTEXT_LENGTH, KVBudget


@dataclass(frozen=True)
class Scale:
    """Tokens, counts and seconds. A server stops repeating a case once it spent `case_limit_s` on it."""

    prefill: tuple[int, ...]
    decode_short: tuple[int, tuple[int, ...]]
    decode_long: tuple[int, tuple[int, ...]]
    decode_tokens: int
    rounds: int
    mixed_prompt: int
    mixed_streams: int
    mixed_rounds: int
    agents: int
    agent_context: int
    agents_that_fit: int
    rotations: int
    turn_prompt: int
    turn_reply: int
    asleep: int
    asleep_context: int
    starts: int
    request_limit_s: float
    case_limit_s: float
    agents_limit_s: float

    @property
    def roomy(self) -> KVBudget:
        """Memory is no matter: a full context in bf16 for every stream of the largest batch."""
        streams = max(self.decode_short[1] + self.decode_long[1] + (self.mixed_streams + 1,))
        return KVBudget(streams * CONTEXT_LENGTH * BF16_TOKEN_NBYTES, streams)

    @property
    def tight(self) -> KVBudget:
        """KV of `agents_that_fit` agents in bf16, with all that they will say, in steps of 512 tokens."""
        turns = self.rotations + 1
        length = self.agent_context + turns * (self.turn_prompt + self.turn_reply)
        tokens = self.agents_that_fit * -(-length // 512) * 512
        # vLLM refuses to start with less than one full context.
        return KVBudget(max(tokens, CONTEXT_LENGTH + 128) * BF16_TOKEN_NBYTES, 1)


FULL = Scale(
    prefill=(1024, 4096, 7168),
    decode_short=(64, (1, 4, 8, 16)),
    decode_long=(4096, (1, 4)),
    decode_tokens=96,
    rounds=2,
    mixed_prompt=7168,
    mixed_streams=4,
    mixed_rounds=1,
    agents=10,
    agent_context=4096,
    agents_that_fit=3,
    rotations=2,
    turn_prompt=32,
    turn_reply=32,
    asleep=100,
    asleep_context=300,
    starts=2,
    request_limit_s=90,
    case_limit_s=30,
    agents_limit_s=100,
)
SMALL = Scale(
    prefill=(64, 256),
    decode_short=(32, (1, 4)),
    decode_long=(256, (1, 2)),
    decode_tokens=24,
    rounds=2,
    mixed_prompt=512,
    mixed_streams=2,
    mixed_rounds=1,
    agents=4,
    agent_context=256,
    agents_that_fit=2,
    rotations=1,
    turn_prompt=32,
    turn_reply=16,
    asleep=5,
    asleep_context=64,
    starts=1,
    request_limit_s=60,
    case_limit_s=20,
    agents_limit_s=60,
)
SCALES = {"full": FULL, "small": SMALL}
