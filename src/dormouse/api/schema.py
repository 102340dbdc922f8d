"""What OpenAI's clients send, field by field.

Three kinds of fields: those declared here are honoured; `IGNORED` ones change nothing that we return and
are accepted; any other one is refused by name, unless it has a value that asks for nothing. A field that
is silently dropped would answer another question than the one asked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dormouse.api.identity import Hints
from dormouse.domain.errors import InvalidRequest
from dormouse.domain.requests import SamplingParams

IGNORED = frozenset(
    {
        "cache_prompt",
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "service_tier",
        "store",
        "verbosity",
    }
)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "suffix": ("",),
}
"""Values of unsupported fields that ask for what happens anyway; so do null and empty lists."""

MAX_CHOICES = 16
"""Answers to one request; each is a sequence of its own."""

Penalty = Annotated[float, Field(ge=-2, le=2)]

StopString = Annotated[str, Field(max_length=512)]
"""Looked for after every token, on the engine's thread: their number and length is everybody's time."""

MAX_STOPS = 64


class StreamOptions(BaseModel):
    """`include_obfuscation` pads chunks against traffic analysis; on one machine there is nothing to hide."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    client_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_honoured(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            neutral = value is None or value in ([], {}) or value in _NEUTRAL.get(name, ())
            if name not in IGNORED and not neutral:
                raise InvalidRequest(f"'{name}' is not supported by this server; leave it out", param=name)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings; empty ones would end every reply and mean nothing."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def samplings(self, *, top_logprobs: int | None, vocab_size: int) -> list[SamplingParams]:
        """The sampling of each of the `n` answers; absent fields have OpenAI's defaults."""
        first = self._sampling(top_logprobs, vocab_size)
        seeds = [None if self.seed is None else self.seed + index for index in range(self.n or 1)]
        return [replace(first, seed=seed) for seed in seeds]

    def hints(self, *, has_tools: bool = False) -> Hints:
        """What the body says about who asks."""
        return Hints(
            has_tools,
            prompt_cache_key=self.prompt_cache_key,
            user=self.user or self.safety_identifier,
            client_metadata=self.client_metadata,
        )

    def _sampling(self, top_logprobs: int | None, vocab_size: int) -> SamplingParams:
        bias = self.logit_bias or {}
        foreign = [token for token in bias if not 0 <= token < vocab_size]
        if foreign:
            raise InvalidRequest(
                f"logit_bias names token {foreign[0]}; this model has 0..{vocab_size - 1}",
                param="logit_bias",
            )
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, _or(self.top_k, 0)),  # -1 is how some clients say off
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=tuple(bias.items()),
            seed=self.seed,
            top_logprobs=top_logprobs,
            stop=self.stops,
            min_tokens=_or(self.min_tokens, 0),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, as text or tokens. Raises InvalidRequest when there are too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if all(isinstance(token, int) for token in prompt):
            return [[token for token in prompt if isinstance(token, int)]]
        several = [one for one in prompt if not isinstance(one, int)]
        if len(several) * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(several)} prompts with {self.n or 1} answers each are too many; "
                f"{MAX_CHOICES} answers are the most",
                param="prompt",
            )
        return several


T = TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
