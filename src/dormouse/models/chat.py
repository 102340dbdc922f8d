"""Text to tokens and back, for one model: tokenizer, chat template, end tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dormouse.domain.constraint import Constraint
from dormouse.domain.conversation import Conversation
from dormouse.domain.errors import InvalidRequest, ModelError
from dormouse.models.chat_template import ChatTemplate, Message
from dormouse.models.decode_stream import DecodeStream, decoder_of
from dormouse.models.family import family_of
from dormouse.models.folder import TOKENIZER, ModelFolder, read_json
from dormouse.models.grammars import Grammars
from dormouse.models.pieces import PieceEncoder
from dormouse.models.rendering import template_messages
from dormouse.models.reply_parser import ReplyParser


class ChatModel:
    """What the server needs of a model to speak with it; no weights. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        eos_token_ids: frozenset[int],
        response_template: Any = None,
    ) -> None:
        """`response_template` is what the tokenizer's config has of that name: how replies are to be read.

        Raises UnsupportedModel when the tokenizer's decoder cannot be streamed.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._pieces = PieceEncoder(tokenizer, partial(self.encode, add_special_tokens=False))
        self._eos_token_ids = eos_token_ids
        self._family = family_of(template.source, self._has_token, self._probe, response_template)
        markers = list(self._family.markers)
        if response_template is not None:
            # Its patterns have bars escaped.
            markers.append(json.dumps(response_template, ensure_ascii=False).replace("\\", ""))
        added = tokenizer.get_added_tokens_decoder().items()
        marked = {i for i, token in added if any(token.content in marker for marker in markers)}
        shown = marked - eos_token_ids
        self._decoder = decoder_of(tokenizer, shown)
        self._grammars = Grammars(tokenizer, eos_token_ids, self._family)
        self._vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: ModelFolder) -> ChatModel:
        """Read tokenizer, template and end tokens from `folder`.

        Raises ModelError when one of its files is damaged, UnsupportedModel as the constructor does.
        """
        tokenizer = _read_tokenizer(folder.path / TOKENIZER)
        settings = _optional_json(folder.path / "tokenizer_config.json")
        generation = _optional_json(folder.path / "generation_config.json")
        template = ChatTemplate.load(folder, settings)
        declared = [generation.get("eos_token_id"), folder.config.get("eos_token_id")]
        ids = {token_id for value in declared for token_id in _ids(value)}
        eos_token = settings.get("eos_token")
        eos_text = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
        if isinstance(eos_text, str) and (named := tokenizer.token_to_id(eos_text)) is not None:
            ids.add(named)
        return cls(tokenizer, template, frozenset(ids), settings.get("response_template"))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a reply: those that the folder's generation config, config and tokenizer
        config declare."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the model's logits may have more columns, which mean nothing."""
        return self._vocab_size

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The prompt for `messages` as token ids; `variables` are the template's own.

        The template writes BOS where the model wants one, so none is added. Raises InvalidRequest when
        the template rejects the messages, ModelError when the template is broken or hostile.
        """
        text = self.render_text(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            **variables,
        )
        return self.encode(text, add_special_tokens=False)

    def render_text(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """`render` before tokenization. Raises as `render` does."""
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def render_conversation(self, conversation: Conversation) -> str:
        """The prompt's text for `conversation`, ready for `encode` without special tokens.

        Raises as `render` does.
        """
        messages, tools = template_messages(conversation, self._family.tool_format, self._family.accepts)
        return self._template.render(
            messages,
            add_generation_prompt=not conversation.continues,
            tools=tools,
            continue_final_message=conversation.continues,
            variables=conversation.variables,
        )

    def reply_parser(self, conversation: Conversation, prompt_text: str) -> ReplyParser:
        """A reader of the reply to `conversation`, whose prompt is `prompt_text`."""
        return self._family.parser(conversation, prompt_text)

    def constraint(self, conversation: Conversation, prompt_text: str, tenant: str) -> Constraint | None:
        """What keeps the reply to `conversation` to its format, its tools and its choice of them; None
        where there is nothing to keep to. Compiles, which may take seconds: call it in a worker thread. What
        was compiled for `tenant` lately costs little.

        Raises InvalidRequest for a strict schema that cannot be enforced.
        """
        return self._grammars.constraint(conversation, prompt_text, tenant)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after BOS where the tokenizer adds one and `add_special_tokens` is set.

        Raises InvalidRequest when `text` is not valid Unicode.
        """
        try:
            # The batch call is the one that lets other threads run meanwhile.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text has lone surrogates; send valid Unicode") from error
        return list(encoding.ids)

    def encode_prompt(self, text: str, tenant: str) -> list[int]:
        """Token ids of a rendered text, with none added. What was encoded for `tenant` lately costs little.

        Raises InvalidRequest when `text` is not valid Unicode.
        """
        return self._pieces.encode(text, tenant)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, without special tokens that are no markup of a reply."""
        stream = self.decode_stream()
        return "".join([*map(stream.push, token_ids), stream.flush()])

    def decode_stream(self) -> DecodeStream:
        """An incremental `decode`, for one reply."""
        return self._decoder.stream()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character; special tokens as written."""
        return self._decoder.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of one token, with U+FFFD for bytes that are no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _has_token(self, text: str) -> bool:
        return self._tokenizer.token_to_id(text) is not None

    def _probe(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> str:
        return self._template.render(
            messages,
            add_generation_prompt=True,
            tools=tools,
            continue_final_message=False,
            variables={},
        )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # all that tokenizers raises
        raise ModelError(f"cannot read {path}: {error}; download or import the model again") from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(value: Any) -> list[int]:
    """One id, a list of them or none: all three are written by transformers."""
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if type(token_id) is int and token_id >= 0]
