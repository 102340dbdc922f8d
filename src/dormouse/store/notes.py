"""What is kept beside blocks and agents: documents and remembered replies, as the writer sees them."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.store.documents import Documents
from dormouse.store.replies import Replies
from dormouse.store.rows import Change


@dataclass(frozen=True, slots=True)
class Notes:
    """Both kinds. They wait in memory until a transaction takes them; one that fails takes nothing."""

    documents: Documents
    replies: Replies

    @property
    def has_unsaved(self) -> bool:
        """Whether anything waits to be written."""
        return self.documents.has_unsaved or self.replies.has_unsaved

    @property
    def unsaved_nbytes(self) -> int:
        """Bytes that wait to be written."""
        return self.documents.unsaved_nbytes + self.replies.unsaved_nbytes

    def plan(self, change: Change) -> None:
        """Add to `change` what is unsaved."""
        documents, change.used_documents = self.documents.unsaved()
        change.documents |= documents
        change.replies |= self.replies.unsaved()

    def apply(self, change: Change) -> None:
        """`change` is committed."""
        self.documents.apply(change.documents, change.used_documents)
        self.replies.apply(change.replies)
