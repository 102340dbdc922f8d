"""Encoding by pieces: what was tokenized once is not tokenized again, for as long as it is remembered.

A conversation that goes on, or a client that sends its tools with every request, repeats most of its text.
Text is cut before special tokens. The tokenizer itself cuts there before it does anything else: normalizer,
pre-tokenizer and merges see each stretch between added tokens by itself. So the ids of a text are those of
its pieces, one after the other. A piece starts with its special token, so that what a tokenizer does only at
the start of a text it does not do here either.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer

_CAPACITY = 8 << 20
"""Characters remembered, of all tenants together: about 50 MB with their ids."""

_SHORTEST = 64
"""Pieces below this are as quickly tokenized as remembered, and would crowd out others by their number."""

_Key = tuple[str, str]
"""Tenant and text: how long an answer takes must not tell one tenant what another one sent."""


class PieceEncoder:
    """Encodes texts without adding tokens to them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> None:
        """`encode` gives the ids of a text by `tokenizer`, with none added."""
        self._border = border(tokenizer)
        self._encode = encode
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, array[int]] = OrderedDict()
        self.num_characters = 0
        """So many are remembered."""

    def encode(self, text: str, tenant: str) -> list[int]:
        """The ids of `text`. Raises as `encode` does."""
        if self._border is None:
            return self._encode(text)
        pieces = self._cut(text, self._border)
        found = self._find(tenant, pieces)
        # One by one: the tokenizer would spread a batch over threads that take the cores from the engine.
        new = {piece: self._encode(piece) for piece, ids in zip(pieces, found, strict=True) if ids is None}
        self._keep(tenant, new)
        result: list[int] = []
        for piece, ids in zip(pieces, found, strict=True):
            result += new[piece] if ids is None else ids
        return result

    @staticmethod
    def _cut(text: str, border: re.Pattern[str]) -> list[str]:
        starts = (match.start() for match in border.finditer(text))
        borders = sorted({0, *starts, len(text)})
        return [text[start:end] for start, end in pairwise(borders)]

    def _find(self, tenant: str, pieces: Sequence[str]) -> list[array[int] | None]:
        found = []
        with self._lock:
            for piece in pieces:
                ids = self._known.get((tenant, piece))
                if ids is not None:
                    self._known.move_to_end((tenant, piece))
                found.append(ids)
        return found

    def _keep(self, tenant: str, new: dict[str, list[int]]) -> None:
        with self._lock:
            for piece, ids in new.items():
                if _SHORTEST <= len(piece) <= _CAPACITY and (tenant, piece) not in self._known:
                    self._known[tenant, piece] = array("i", ids)
                    self.num_characters += len(piece)
            while self.num_characters > _CAPACITY:
                (_, piece), _ = self._known.popitem(last=False)
                self.num_characters -= len(piece)


def border(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches special tokens before which a text can be cut without a change of its ids; None where none can.

    Not those that take in the space before them, or look at the character before them, nor those that another
    added token could run into: there the tokenizer's own search might cut elsewhere.
    """
    tokens = list(tokenizer.get_added_tokens_decoder().values())
    cuts = [token for token in tokens if _stands_alone(token)]
    others = [token.content for token in tokens if not _stands_alone(token)]
    safe = [
        token.content
        for token in cuts
        if not any(token.content[0] in other[1:] or other.startswith(token.content) for other in others)
        and not any(token.content[0] in other.content[1:] for other in cuts)
    ]
    # The longest first, as the tokenizer finds them.
    safe.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, safe))) if safe else None


def _stands_alone(token: AddedToken) -> bool:
    return token.special and not (token.normalized or token.lstrip or token.single_word)
