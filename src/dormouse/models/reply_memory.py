"""Replies as they were generated, by the conversation that they ended: in the store, and ready for use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from dormouse.domain.blocks import Namespace
from dormouse.domain.conversation import Message
from dormouse.models.chat import ChatModel
from dormouse.models.splicing import RememberedReply, conversation_keys
from dormouse.store.block_store import BlockStore

_MOST_NBYTES = 64 << 20
"""Of replies kept decoded: a conversation asks for all of its own with each turn."""

_TOKEN_NBYTES, _REPLY_NBYTES = 36, 400
"""What Python takes for a token in a tuple, and for a reply beside its tokens and text."""


class ReplyMemory:
    """The replies of all tenants of all models; their namespaces tell them apart. Thread-safe."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._decoded: OrderedDict[tuple[Namespace, bytes], RememberedReply] = OrderedDict()
        self._nbytes = 0

    def remember(
        self, namespace: Namespace, conversation: bytes, reply: Message, tokens: Sequence[int]
    ) -> None:
        """`tokens` were generated after the conversation of that key, and shown as `reply`."""
        (key,) = conversation_keys([reply], conversation)
        self._store.notebook.remember(namespace, key, (int(bool(reply.reasoning)), *tokens))
        self._drop((namespace, key))

    def recall(self, namespace: Namespace, key: bytes, chat: ChatModel) -> RememberedReply | None:
        """The reply that ended the conversation of that key, if it was generated here and is remembered."""
        found = self._store.notebook.recall(namespace, key)
        if found is None:
            self._drop((namespace, key))
            return None
        has_reasoning, *tokens = found
        if tokens and tokens[-1] in chat.eos_token_ids:
            tokens.pop()  # the template writes it
        with self._lock:
            known = self._decoded.get((namespace, key))
            if known is not None and known.tokens == tuple(tokens):
                self._decoded.move_to_end((namespace, key))
                return known
        reply = RememberedReply(tuple(tokens), chat.decode(tokens), bool(has_reasoning))
        self._drop((namespace, key))
        with self._lock:
            self._decoded[namespace, key] = reply
            self._nbytes += _nbytes(reply)
            while self._nbytes > _MOST_NBYTES:
                self._nbytes -= _nbytes(self._decoded.popitem(last=False)[1])
        return reply

    def _drop(self, who: tuple[Namespace, bytes]) -> None:
        with self._lock:
            if (reply := self._decoded.pop(who, None)) is not None:
                self._nbytes -= _nbytes(reply)


def _nbytes(reply: RememberedReply) -> int:
    return _REPLY_NBYTES + _TOKEN_NBYTES * len(reply.tokens) + len(reply.text)
