"""From token ids back to text, one id at a time.

The text of a stream equals `Tokenizer.decode` of all its ids, character for character, and no part of it
is taken back; special tokens that are markup of a reply show as they are written, where that is asked for.
The library's own `DecodeStream` is not used: it swallows a reply's last bytes when they are an unfinished
character, and it holds text back after a U+FFFD that is meant.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from dormouse.domain.errors import UnsupportedModel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class DecodeStream(Protocol):
    """Text of one growing sequence. Belongs to one reply; not to be shared between threads."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` came; empty inside a character."""

    def flush(self) -> str:
        """What was held back, U+FFFD for bytes that never became a character. Ends the stream."""


class Decoder(Protocol):
    """How a tokenizer spells its tokens."""

    def stream(self) -> DecodeStream:
        """A stream at its start."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for, special ones as they are written; none for an id past the
        vocabulary."""


def decoder_of(tokenizer: Tokenizer, shown: Collection[int] = ()) -> Decoder:
    """The decoder of `tokenizer`. Special tokens do not show in its text, but for those in `shown`.

    Raises UnsupportedModel for a kind that cannot be streamed exactly.
    """
    steps = _steps(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder else []
    kinds = [step["type"] for step in steps]
    hidden = special_ids(tokenizer).difference(shown)
    if kinds == ["ByteLevel"]:
        return _ByteLevel(tokenizer, hidden)
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _Sentencepiece(tokenizer, steps, hidden)
    raise UnsupportedModel(
        f"the tokenizer decodes by {' + '.join(kinds) or 'nothing'}; byte-level BPE and sentencepiece "
        "with byte fallback are supported"
    )


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that stand for no text of their own."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


class _ByteLevel:
    """GPT-2's spelling: one printable character per byte."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._hidden = hidden
        self._byte_of = _byte_alphabet()

    def stream(self) -> DecodeStream:
        return _ByteLevelStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        spelled = [self._byte_of.get(character) for character in token]
        if token_id in self._special or None in spelled:
            return token.encode()
        return bytes(byte for byte in spelled if byte is not None)

    def text_bytes(self, token_id: int) -> bytes:
        """`token_bytes`, none for hidden tokens."""
        return b"" if token_id in self._hidden else self.token_bytes(token_id)


class _ByteLevelStream:
    def __init__(self, decoder: _ByteLevel) -> None:
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._decoder.text_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True, slots=True)
class _Strip:
    """How many of which character the decoder drops from the start of a text."""

    character: str = " "
    count: int = 0


class _Sentencepiece:
    """Tokens as text with marked spaces, and one token per byte for what the vocabulary lacks."""

    def __init__(self, tokenizer: Tokenizer, steps: list[dict[str, Any]], hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._hidden = hidden
        self._replacements = [
            (step["pattern"]["String"], step["content"])
            for step in steps
            if step["type"] == "Replace" and "String" in step["pattern"]
        ]
        strips = [_Strip(step["content"], step["start"]) for step in steps if step["type"] == "Strip"]
        if any(step["type"] == "Strip" and step["stop"] for step in steps) or len(strips) > 1:
            raise UnsupportedModel("the tokenizer strips the end of a text, which no stream can know")
        if len(self._replacements) != sum(step["type"] == "Replace" for step in steps):
            raise UnsupportedModel("the tokenizer replaces by regular expression when it decodes")
        self._strip = strips[0] if strips else _Strip()

    def stream(self) -> DecodeStream:
        return _SentencepieceStream(self, self._strip)

    def token_bytes(self, token_id: int) -> bytes:
        if (byte := self.byte(token_id)) is not None:
            return bytes((byte,))
        text = self.text(token_id)
        return (text if text is not None else self._tokenizer.id_to_token(token_id) or "").encode()

    def byte(self, token_id: int) -> int | None:
        """The byte, if the token is one of those that stand for one."""
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def text(self, token_id: int) -> str | None:
        """The text of a token that is no byte; None when it is hidden or none at all."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._hidden:
            return None
        if token_id in self._special:
            return token
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token


class _SentencepieceStream:
    def __init__(self, decoder: _Sentencepiece, strip: _Strip) -> None:
        self._decoder = decoder
        self._strip = strip.character
        self._left_to_strip = strip.count
        # A run of byte tokens is text only if the whole run is UTF-8, so it waits for its end.
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        text = self._decoder.text(token_id)
        if text is None:
            return ""
        byte = self._decoder.byte(token_id)
        if byte is None:
            return self._stripped(self._end_run() + text)
        self._run.append(byte)
        return ""

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._left_to_strip and text:
            if text[0] != self._strip:
                self._left_to_strip = 0
                break
            text = text[1:]
            self._left_to_strip -= 1
        return text


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _byte_alphabet() -> dict[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}
