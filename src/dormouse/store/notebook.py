"""Documents and remembered replies: what is kept beside blocks and agents, as callers see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dormouse.domain.blocks import Namespace, pack_tokens, unpack_tokens
from dormouse.store.agent_admin import ADMIN_TIMEOUT_S, Run
from dormouse.store.documents import DocumentInfo
from dormouse.store.encryption import require_owner
from dormouse.store.opening import StoreParts
from dormouse.store.rows import DocumentId, ReplyId


class Notebook:
    """Both kinds of one open store; bounded, see `StoreOptions`. Any thread may call."""

    def __init__(
        self, parts: StoreParts, run: Run, wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        """`wake` tells the writer that there is something to write."""
        self._parts = parts
        self._documents = parts.notes.documents
        self._replies = parts.notes.replies
        self._run = run
        self._wake = wake
        self._clock = clock

    def has(self, document: DocumentId) -> bool:
        """Whether there is such a document. Counts as a use."""
        return self._documents.get(document, self._clock())[0]

    def put(self, tenant: str, kind: str, id: str, body: bytes) -> None:
        """Keep a document under that name; it is there at once and written soon.

        Raises DocumentsFull: above the bounds in `StoreOptions` the longest unused of its tenant and kind
        go, but of `kept_kinds` a new one is refused. Raises ValueError when a name is no Unicode.
        """
        "".join((tenant, kind, id)).encode()
        self._documents.put(DocumentId(tenant, kind, id), body, self._clock())
        self._wake()

    def get(self, tenant: str, kind: str, id: str) -> bytes | None:
        """The document of that name. Counts as a use.

        Waits for the writer where the body is not in memory. Raises StoreError and DeadlineExceeded.
        """
        name = DocumentId(tenant, kind, id)
        exists, body = self._documents.get(name, self._clock())
        if body is None and exists:
            body = self._run(lambda: self.read(name), ADMIN_TIMEOUT_S)
        return body

    def read(self, name: DocumentId) -> bytes | None:
        """A document's body, on the writer thread."""
        exists, body = self._documents.get(name, self._clock())
        if body is None and exists:
            body = self._parts.catalog.document(name)
            if body is not None:
                self._documents.remember(name, body)
        return body

    def delete(self, tenant: str, kind: str, id: str) -> bool:
        """Forget a document; whether there was one."""
        found = self._documents.delete(DocumentId(tenant, kind, id))
        self._wake()
        return found

    def page(self, tenant: str, kind: str, limit: int = 100, after: str | None = None) -> list[DocumentInfo]:
        """Up to `limit` documents in the order of their ids, from behind the id `after` on."""
        return self._documents.page(tenant, kind, limit, after)

    def remember(self, namespace: Namespace, key: bytes, tokens: Sequence[int]) -> None:
        """Remember the tokens of a reply under `key`. Waits for nothing.

        Raises ValueError for tokens that do not fit in 32 bits.
        """
        require_owner(self._parts.vault, namespace)
        self._replies.put(ReplyId(namespace, key), packed(tokens), self._clock())
        self._wake()

    def recall(self, namespace: Namespace, key: bytes) -> tuple[int, ...] | None:
        """The tokens remembered under `key`, from memory. Counts as a use."""
        found = self._replies.get(ReplyId(namespace, key), self._clock())
        return None if found is None else tuple(unpack_tokens(found))


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes. Raises ValueError for those that do not fit in 32 bits."""
    try:
        return pack_tokens(tokens)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"tokens do not fit in 32 bits: {error}") from None
