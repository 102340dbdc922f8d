"""What agents say, cut from this repository's own pages, and the words that must not leak between them."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHARS_PER_TOKEN = 3.8
"""Of these pages under SmolLM2's tokenizer, about; only the sizes of prompts depend on it."""

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FILES = [str(page.relative_to(ROOT)) for page in PAGES]
_CANARY = re.compile(r"\b(?:[BDFGKLMNPRSTVZ][aeiou]){1}(?:[bdfgklmnprstvz][aeiou]){2}\d{3}\b")


class Words:
    """Pieces of the pages. Which one is the caller's random number generator's choice."""

    def __init__(self) -> None:
        self._text = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)

    def piece(self, chance: random.Random, num_tokens: int) -> str:
        """About `num_tokens` of text that begins at a line's start."""
        size = int(num_tokens * CHARS_PER_TOKEN)
        start = chance.randrange(len(self._text) - size)
        start = self._text.find("\n", start, len(self._text) - size) + 1 or start
        return self._text[start : start + size].strip()


class Canaries:
    """A word for each family of agents: nobody else's reply may hold it. A fork is of its source's family."""

    def __init__(self) -> None:
        self._family: dict[str, str] = {}
        self.asked = 0
        self.said = 0
        self.leaks: list[str] = []

    def new(self, chance: random.Random, family: str) -> str:
        """A word that nothing else contains."""
        while True:
            word = "".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(3))
            word = f"{word.capitalize()}{chance.randrange(100, 1000)}"
            if word not in self._family:
                self._family[word] = family
                return word

    def look(self, family: str, text: str, *, asked: bool) -> None:
        """Take note of what a reply says; `asked` are those that were asked for their own word."""
        found = Counter(self._family.get(word) for word in _CANARY.findall(text))
        self.asked += asked
        self.said += asked and family in found
        foreign = [owner for owner in found if owner not in (None, family)]
        self.leaks += [f"a reply to {family} has the word of {owner}" for owner in foreign]
