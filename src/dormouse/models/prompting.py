"""From a conversation to the tokens of its prompt, for one tenant, with its past as it was generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dormouse.domain.blocks import Namespace
from dormouse.domain.conversation import Conversation, Message
from dormouse.domain.errors import InvalidRequest
from dormouse.models.chat import ChatModel
from dormouse.models.reply_memory import ReplyMemory
from dormouse.models.splicing import RememberedReply, conversation_keys, spliced


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the template made, `keys` name the conversation after each message."""

    text: str
    tokens: tuple[int, ...]
    keys: tuple[bytes, ...]


class Prompter:
    """Renders and tokenizes; blocking, for worker threads. Remembers replies in the tenant's namespace."""

    def __init__(self, chat: ChatModel, replies: ReplyMemory, tenant: str, namespace: Namespace) -> None:
        self._chat = chat
        self._tenant = tenant
        self._replies = replies
        self._namespace = namespace

    def prepare(self, conversation: Conversation) -> Prompt:
        """The prompt. Raises InvalidRequest when the template rejects the conversation."""
        text = self._chat.render_conversation(conversation)
        try:
            spans = spliced(
                conversation, text, self._chat.render_conversation, self._recall, self._chat.decode
            )
        except InvalidRequest:
            spans = [text]  # a template that minds what a message says is rendered once only
        tokens: list[int] = []
        for span in spans:
            if isinstance(span, str):
                tokens += self._chat.encode_prompt(span, self._tenant)
            else:
                tokens += span
        return Prompt(text, tuple(tokens), tuple(conversation_keys(conversation.messages)))

    def remember(self, prompt: Prompt, reply: Message, tokens: Sequence[int]) -> None:
        """`tokens` were generated after `prompt` and shown as `reply`."""
        before = prompt.keys[-1] if prompt.keys else b""
        self._replies.remember(self._namespace, before, reply, tokens)

    def _recall(self, key: bytes) -> RememberedReply | None:
        return self._replies.recall(self._namespace, key, self._chat)
