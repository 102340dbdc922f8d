"""Prompts: the same text for every server, so many tokens of it, and no two with the same beginning."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


class Texts:
    """Cuts prompts from the language reference that ships with Python: prose with code in it."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        whole = "\n\n".join(topics[name] for name in sorted(topics))
        self._corpus: list[int] = self._tokenizer.encode(whole, add_special_tokens=False).ids
        self._next = 0

    def fresh(self, name: str, num_tokens: int) -> str:
        """A prompt of `num_tokens` that begins with `name`, unlike any other: nothing of it is cached.

        Each comes from another place of the reference, as long as that lasts.
        """
        head = f"{name}: notes on Python.\n\n"
        return head + self._cut(num_tokens - self.count(head))

    def more(self, name: str, num_tokens: int) -> str:
        """About `num_tokens` of what a user says next, for a prompt that goes on."""
        head = f"\n\nUser {name}: "
        tail = "\nAssistant:"
        return head + self._cut(num_tokens - self.count(head + tail)) + tail

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut(self, num_tokens: int) -> str:
        if self._next + num_tokens > len(self._corpus):
            self._next = 0
        piece = self._corpus[self._next : self._next + num_tokens]
        self._next += num_tokens
        text: str = self._tokenizer.decode(piece)
        return text
