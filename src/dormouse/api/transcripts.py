"""What was said to an agent and by it, as chat messages: a document of the store beside its blocks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from dormouse.api.chat_rendering import render_call
from dormouse.api.chat_schema import ChatBody
from dormouse.domain.conversation import Message
from dormouse.domain.errors import InvalidRequest
from dormouse.store.agent_book import TRANSCRIPT
from dormouse.store.block_store import BlockStore

SETTINGS = "agent"
"""The kind of document that an agent was made with: its system prompt, tools and settings."""


class _Made(BaseModel):
    """The document of kind `SETTINGS`. It may have come in an agent's file, and hold anything."""

    system: str | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)


class _Kept(BaseModel):
    """The document of kind `TRANSCRIPT`, as doubtful."""

    model: str = ""
    messages: list[dict[str, Any]] = Field(default_factory=list)


D = TypeVar("D", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Transcript:
    """An agent's conversation so far, and what it was made with. `model` is empty before its first turn."""

    model: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def apply(self, turn: ChatBody, model: str) -> ChatBody:
        """The chat completion that `turn` stands for. Raises InvalidRequest for settings that are none."""
        said = turn.model_dump(exclude_unset=True)
        system = [{"role": "system", "content": self.system}] if self.system else []
        whole = {
            **self.settings,
            **({"tools": self.tools} if self.tools else {}),
            **said,
            "model": model,
            "messages": [*system, *self.messages, *said["messages"]],
        }
        try:
            return ChatBody.model_validate(whole)
        except ValidationError as error:
            raise InvalidRequest(
                f"the settings that this agent was made with do not fit: {_said(error)}", param="settings"
            ) from error

    def after(self, turn: ChatBody, reply: Message, model: str) -> Transcript:
        """The transcript with a turn and its reply."""
        said = turn.model_dump(exclude_unset=True)["messages"]
        answer: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.reasoning:
            answer["reasoning_content"] = reply.reasoning
        if reply.calls:
            answer["tool_calls"] = [render_call(call) for call in reply.calls]
        messages = [*self.messages, *said, answer]
        return Transcript(model, messages, self.system, self.tools, self.settings)


class Transcripts:
    """The transcripts of all agents. Its methods wait for the store: for worker threads."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def read(self, tenant: str, name: str) -> Transcript:
        """An agent's transcript; an empty one before its first turn.

        Raises AgentNotFound, and InvalidRequest when its client keeps the conversation itself.
        """
        agent = self._store.agent(tenant, name)
        made = self._document(tenant, SETTINGS, name, _Made)
        kept = self._document(tenant, TRANSCRIPT, name, _Kept)
        if kept is None and agent.num_tokens:
            raise InvalidRequest(
                f"agent '{name}' was talked to by a client that keeps the conversation itself; go on there, "
                "or create another agent",
                param="agent",
            )
        kept, made = kept or _Kept(), made or _Made()
        return Transcript(kept.model, kept.messages, made.system, made.tools, made.settings)

    def write(self, tenant: str, name: str, transcript: Transcript) -> None:
        """Keep a transcript. Raises DocumentsFull."""
        kept = {"model": transcript.model, "messages": transcript.messages}
        self._store.notebook.put(tenant, TRANSCRIPT, name, json.dumps(kept).encode())

    def _document(self, tenant: str, kind: str, name: str, form: type[D]) -> D | None:
        body = self._store.notebook.get(tenant, kind, name)
        if body is None:
            return None
        try:
            return form.model_validate_json(body)
        except ValidationError as error:
            raise InvalidRequest(
                f"what agent '{name}' was made with cannot be used ({_said(error)}); create it anew",
                param="agent",
            ) from error


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
