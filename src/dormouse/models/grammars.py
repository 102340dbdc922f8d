"""Replies that are valid by construction: JSON that a schema allows, calls with the arguments they need.

The grammar of a reply is written in the form that the model's family uses, so that the parser reads back
what the grammar allows. llguidance compiles it and says, token by token, what may come next. What a client
wants enforced in full is compiled in full, or refused with the reason before anything runs; the rest is
enforced as far as it goes.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from dormouse.domain.constraint import Constraint
from dormouse.domain.conversation import Conversation, OutputFormat, Tool, ToolMode
from dormouse.domain.errors import InvalidRequest
from dormouse.models.family import Family, callable_tools
from dormouse.models.lark import LarkWriter
from dormouse.models.tool_formats.base import CallForm

log = logging.getLogger(__name__)

_MOST_SCHEMA_CHARACTERS = 256 * 1024
_MOST_CACHED = 64
_WORD_BITS = 32

_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""Bounds on hostile schemas: milliseconds for a mask, some seconds and 100 MB for a compilation."""

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammars:
    """Compiles for one model. Thread-safe; it blocks, so it is not for the event loop or the engine."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], family: Family) -> None:
        """Cheap: llguidance's view of the vocabulary is made on first use."""
        self._tokenizer = tokenizer
        num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
        self._eos = sorted(token_id for token_id in eos_token_ids if token_id < num_tokens)
        self._family = family
        self._writer = LarkWriter(self._special_id)
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        # By tenant, too: how long an answer takes must not tell one tenant what another one sent.
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def constraint(self, conversation: Conversation, prompt_text: str, tenant: str) -> Constraint | None:
        """What the reply to `conversation` has to look like; None where it is free.

        Raises InvalidRequest for a schema that is to be enforced in full and cannot be.
        """
        body = self._body(conversation, tenant)
        if body is None:
            return None
        lark = self._writer.grammar(
            body, self._family.thinking, is_thinking=self._family.is_thinking(prompt_text)
        )
        try:
            return GrammarConstraint(self._continued(self._matcher(lark, tenant), conversation))
        except InvalidRequest as error:
            if is_strict(conversation):
                raise
            log.warning("a reply goes on without its grammar: %s", error)
            return None

    def _body(self, conversation: Conversation, tenant: str) -> str | None:
        """The rules of the reply, without its reasoning."""
        if not is_bound(conversation):
            return None
        tools, choice = callable_tools(conversation), conversation.choice
        if tools and choice.mode is ToolMode.REQUIRED:
            form = self._call_form(tools, tenant)
            return self._writer.calls(form, parallel=choice.parallel)
        if conversation.format is not None:
            text = self._writer.json_text(self._schema(conversation.format, tenant))
            if not tools:
                return text
            form = self._call_form(tools, tenant)
            return f"{text} | {self._writer.calls(form, parallel=choice.parallel)}"
        form = self._call_form(tools, tenant)
        return self._writer.text_or_calls(form, parallel=choice.parallel)

    # -- schemas -------------------------------------------------------------------------------

    def _call_form(self, tools: Sequence[Tool], tenant: str) -> CallForm:
        """The form of calls of `tools`, with schemas that compile.

        Raises InvalidRequest when a strict one does not, or when the form leaves a part of it out.
        """
        call_form = self._family.tool_format.call_form
        left_out = call_form([tool for tool in tools if tool.strict]).left_out
        if left_out:
            raise InvalidRequest(
                f"this model's way of calling tools cannot enforce {', '.join(sorted(left_out))}; "
                "leave that out of the schemas of strict tools, or leave 'strict' out",
                param="tools",
            )
        checked = (self._checked(t.parameters, t.strict, f"tool '{t.name}'", "tools", tenant) for t in tools)
        return call_form(
            [replace(tool, parameters=schema) for tool, schema in zip(tools, checked, strict=True)]
        )

    def _schema(self, wanted: OutputFormat, tenant: str) -> Mapping[str, Any]:
        if wanted.schema is None:
            return _ANY_OBJECT
        return self._checked(wanted.schema, wanted.strict, "the response format", "response_format", tenant)

    def _checked(
        self, schema: Mapping[str, Any], strict: bool, whose: str, param: str, tenant: str
    ) -> Mapping[str, Any]:
        """`schema` if it compiles, in full where it is `strict`; else any object will do.

        Raises InvalidRequest for a strict one that does not.
        """
        try:
            self._compile_schema(schema, tenant, lenient=not strict)
        except InvalidRequest as error:
            if strict:
                raise InvalidRequest(
                    f"the schema of {whose} cannot be enforced: {error}; change it, or leave 'strict' out",
                    param=param,
                ) from error
            log.warning("the schema of %s is not enforced: %s", whose, error)
            return _ANY_OBJECT
        return schema

    def _compile_schema(self, schema: Mapping[str, Any], tenant: str, *, lenient: bool) -> None:
        """Raises InvalidRequest with what llguidance has against it."""
        try:
            text = json.dumps(schema)
            if len(text) > _MOST_SCHEMA_CHARACTERS:
                raise InvalidRequest(f"it has more than {_MOST_SCHEMA_CHARACTERS} characters")
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"lenient": lenient})
        except (RecursionError, ValueError) as error:
            raise InvalidRequest(f"it is nested too deep: {error}") from error
        self._matcher(grammar, tenant)

    # -- compilation ---------------------------------------------------------------------------

    def _continued(self, matcher: LLMatcher, conversation: Conversation) -> LLMatcher:
        """The matcher behind the words that the reply goes on from."""
        if conversation.continues:
            begun = self._vocabulary().tokenize_str(conversation.messages[-1].text)
            if matcher.try_consume_tokens(begun) < len(begun):
                raise InvalidRequest(
                    "the last message, which the reply continues, is not the beginning of what was asked for",
                    param="messages",
                )
        return matcher

    def _matcher(self, grammar: str, tenant: str) -> LLMatcher:
        """A matcher at its start. Raises InvalidRequest when there is none."""
        name = tenant, grammar
        with self._lock:
            if name in self._compiled:
                self._compiled.move_to_end(name)
                return self._compiled[name].deep_copy()
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidRequest(_reason(matcher.get_error()))
        with self._lock:
            self._compiled[name] = matcher
            if len(self._compiled) > _MOST_CACHED:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _special_id(self, text: str) -> int | None:
        """The id of `text` where it is one token that llguidance does not take for text: these are more
        than the tokenizer's special ones."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id is not None and self._vocabulary().is_special_token(token_id) else None

    def _vocabulary(self) -> LLTokenizer:
        """Made once: it takes a few tenths of a second."""
        with self._lock:
            if self._ll_tokenizer is None:
                try:
                    self._ll_tokenizer = LLTokenizer(self._tokenizer.to_str(), eos_token=self._eos or None)
                except ValueError as error:
                    raise InvalidRequest(f"this model's replies cannot be constrained: {error}") from error
            return self._ll_tokenizer


class GrammarConstraint:
    """One reply's place in its grammar. Implements `Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask: memoryview) -> None:
        """Set the bits of the tokens that may come next; none when the grammar is broken."""
        words = np.frombuffer(mask, np.int32)
        words[:] = 0
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        # Where it gave up, it would let the reply end in the middle.
        if not self._matcher.is_error():
            # The model's logits may have more columns than the vocabulary has tokens.
            count = min(len(allowed), len(words))
            words[:count] = allowed[:count]

    def took(self, token: int) -> bool:
        """`token` came next. False when the grammar does not allow it or gave up."""
        return self._matcher.consume_token(token) and not self._matcher.is_error()

    def forced(self) -> Sequence[int]:
        """Tokens that can only come next."""
        return self._matcher.compute_ff_tokens()


def is_bound(conversation: Conversation) -> bool:
    """Whether the reply has to keep to a grammar. Cheap."""
    tools, choice = callable_tools(conversation), conversation.choice
    if conversation.format is not None or not tools:
        return conversation.format is not None
    return choice.mode is ToolMode.REQUIRED or not choice.parallel or any(tool.strict for tool in tools)


def is_strict(conversation: Conversation) -> bool:
    """Whether anything was promised to be valid by construction."""
    wanted = conversation.format
    return any(tool.strict for tool in callable_tools(conversation)) or (wanted is not None and wanted.strict)


def _reason(error: str) -> str:
    """llguidance's own words, in one line and without the grammar that it quotes."""
    lines = (line.strip() for line in error.splitlines())
    return "; ".join(line for line in lines if line and not set(line) <= set("^ |0123456789"))[:300]
