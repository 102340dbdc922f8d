"""What OpenAI's clients send, field by field.

Three kinds of fields: those declared here are honoured; `IGNORED` ones change nothing that we return and
are accepted; any other one is refused by name, unless it has a value that asks for nothing. A field that
is silently dropped would answer another question than the one asked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dormouse.domain.errors import InvalidRequest
from dormouse.domain.requests import SamplingParams

IGNORED = frozenset(
    {
        "cache_prompt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
}
"""Values of unsupported fields that ask for what happens anyway; so do null and empty lists."""

Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """`include_obfuscation` pads chunks against traffic analysis; on one machine there is nothing to hide."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow")

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
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    prompt_cache_key: str | None = None

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

    def sampling(self, *, max_tokens: int, top_logprobs: int | None, vocab_size: int) -> SamplingParams:
        """The sampling this body asks for; absent fields have OpenAI's defaults."""
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
            max_tokens=max_tokens,
            min_tokens=min(_or(self.min_tokens, 0), max_tokens),
            ignore_eos=bool(self.ignore_eos),
        )


class Part(BaseModel):
    """A part of a message's content. Only text can be served."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    def text(self, index: int) -> str:
        """The content as one text. Raises InvalidRequest for anything that is not text."""
        if isinstance(self.content, str) or self.content is None:
            return self.content or ""
        for number, part in enumerate(self.content):
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                raise InvalidRequest(
                    f"content of type '{part.type}' is not supported; send text",
                    param=f"messages.{index}.content.{number}",
                )
        return "".join(part.text or "" for part in self.content)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def rendered(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        out = []
        for index, message in enumerate(self.messages):
            extra = {k: v for k, v in (message.model_extra or {}).items() if v and k != "name"}
            if message.role in ("tool", "function") or extra.keys() & {"tool_calls", "function_call"}:
                raise InvalidRequest(
                    "tool calls are not supported by this server yet; send text messages",
                    param=f"messages.{index}",
                )
            # Templates know "system"; "developer" is OpenAI's newer name for it.
            role = "system" if message.role == "developer" else message.role
            out.append({"role": role, "content": message.text(index)})
        return out


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def single_prompt(self) -> str | list[int]:
        """The one prompt. Raises InvalidRequest where there are several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], int):
            return [token for token in prompt if isinstance(token, int)]
        if len(prompt) != 1:
            raise InvalidRequest(
                f"{len(prompt)} prompts in one request are not supported; send one", param="prompt"
            )
        only = prompt[0]
        assert not isinstance(only, int)
        return only


T = TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
