"""Grammars: what they allow the parser reads back, what cannot be enforced is refused or left out."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLParserLimits
from tests.models.test_reply_parser import FORMATS
from tokenizers import Tokenizer

from dormouse.domain.constraint import Constraint
from dormouse.domain.conversation import (
    Called,
    Conversation,
    Message,
    OutputFormat,
    Role,
    Said,
    Thought,
    Tool,
    ToolChoice,
    ToolMode,
)
from dormouse.domain.errors import InvalidRequest
from dormouse.models import grammars as grammars_module
from dormouse.models.decode_stream import decoder_of
from dormouse.models.family import Family
from dormouse.models.folder import TOKENIZER, ModelFolder
from dormouse.models.grammars import Grammars
from dormouse.models.rendering import Accepts
from dormouse.models.reply_parser import ThinkingMarkers
from dormouse.models.tool_formats.base import ToolFormat
from dormouse.models.tool_formats.function_gemma import FunctionGemma
from dormouse.models.tool_formats.hermes import Hermes
from dormouse.models.tool_formats.llama import Llama3
from dormouse.models.tool_formats.qwen_xml import QwenXml

THINK = ThinkingMarkers("<think>", "</think>")
ASK = (Message(Role.USER, "Go."),)
COLOR = {"type": "string", "enum": ["red", "<b>&\"'", "été"]}
PAINT = Tool(
    "paint.it",
    "",
    {
        "type": "object",
        "properties": {
            "color": COLOR,
            "coats": {"type": "integer", "minimum": 1, "maximum": 99},
            "dry": {"type": "boolean"},
            "others": {"type": "array", "items": COLOR, "maxItems": 3},
        },
        "required": ["color", "dry"],
        "additionalProperties": False,
    },
)
STOP = Tool(
    "stop", "", {"type": "object", "properties": {"now": {"type": "boolean"}}, "additionalProperties": False}
)
TOOLS = (PAINT, STOP)
REQUIRED = ToolChoice(ToolMode.REQUIRED)


class Model:
    """A vocabulary with a family's ways; no weights."""

    def __init__(
        self,
        folder: ModelFolder,
        tool_format: ToolFormat,
        thinking: ThinkingMarkers | None = None,
        end: str = "<|im_end|>",
    ) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder.path / TOKENIZER))
        self.family = Family(Accepts(), tool_format, thinking)
        end_id = self.tokenizer.token_to_id(end)
        assert end_id is not None
        self.end: int = end_id

    def with_special(self) -> Model:
        """The same with a special token for each marker."""
        self.tokenizer.add_special_tokens(list(self.family.markers))
        return self

    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, frozenset({self.end}), self.family)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def walk(self, constraint: Constraint, seed: int, most: int = 600) -> str:
        """A reply of tokens chosen at random among those allowed; it ends as soon as it may."""
        rng = random.Random(seed)
        tokens: list[int] = []
        while (allowed := self.allowed(constraint)) and self.end not in allowed:
            tokens.append(rng.choice(allowed))
            assert constraint.took(tokens[-1])
            assert len(tokens) < most, self.text(tokens)[-200:]
        assert allowed
        assert constraint.took(self.end)
        return self.text(tokens)

    def allowed(self, constraint: Constraint) -> list[int]:
        words = np.zeros(-(-self.tokenizer.get_vocab_size() // 32), np.uint32)
        constraint.fill_mask(words.data)
        ids: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        return ids

    def text(self, tokens: list[int]) -> str:
        shown = {
            found for text in self.family.markers if (found := self.tokenizer.token_to_id(text)) is not None
        }
        stream = decoder_of(self.tokenizer, shown).stream()
        return "".join([*map(stream.push, tokens), stream.flush()])

    def follows(self, constraint: Constraint, text: str) -> bool:
        """Whether the reply may be `text`, whole."""
        return all(map(constraint.took, self.encode(text))) and self.end in self.allowed(constraint)


@pytest.fixture(scope="module")
def folder(byte_level_folder: ModelFolder) -> ModelFolder:
    """A small vocabulary, which is quick to prepare."""
    return byte_level_folder


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_allows_the_parser_reads(folder: ModelFolder, name: str, special: bool) -> None:
    model = Model(folder, FORMATS[name], THINK)
    if special:
        model.with_special()
    grammars = model.grammars()
    left_out = model.family.tool_format.call_form(TOOLS).left_out
    tools = (_without(PAINT, left_out), STOP)
    for parallel in (True, False):
        asked = Conversation(ASK, tools, replace(REQUIRED, parallel=parallel))
        for seed in range(6):
            constraint = grammars.constraint(asked, "", "acme")
            assert constraint is not None
            if model.family.thinking:
                # Without it half of the walks would think for ever.
                for token in model.encode("<think>hm</think>"):
                    assert constraint.took(token)
            text = model.walk(constraint, seed)
            parser = model.family.parser(asked, "<think>")
            pieces = [*parser.push("hm</think>" + text), *parser.finish()]
            assert pieces[0] == Thought("hm")
            calls = [piece.call for piece in pieces[1:] if isinstance(piece, Called)]
            assert calls, text
            assert len(calls) == len(pieces) - 1, text
            assert parallel or len(calls) == 1
            for call in calls:
                schema = {tool.name: tool.parameters for tool in tools}[call.name]
                jsonschema.validate(json.loads(call.arguments), schema)


def test_a_named_choice_allows_no_other_tool(folder: ModelFolder) -> None:
    model = Model(folder, Hermes())
    grammars = model.grammars()
    asked = Conversation(ASK, TOOLS, ToolChoice(ToolMode.REQUIRED, ("stop",), parallel=False))
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'

    def allows(text: str) -> bool:
        return model.follows(_some(grammars.constraint(asked, "", "acme")), text)

    assert allows(call)
    assert not allows(call + "\n" + call)
    assert not allows("Hello")
    assert not allows('<tool_call>\n{"name": "paint.it", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_strict_tools_under_auto_leave_text_free(folder: ModelFolder, special: bool) -> None:
    model = Model(folder, Hermes())
    if special:
        model.with_special()
    grammars = model.grammars()
    asked = Conversation(ASK, (replace(STOP, strict=True),))
    call = '<tool_call>\n{"name": "stop", "arguments": {"now": true}}\n</tool_call>'

    def allows(text: str) -> bool:
        return model.follows(_some(grammars.constraint(asked, "", "acme")), text)

    assert allows("Any text < at {all}.")
    assert allows("")
    assert allows(f"First this:\n{call}\n{call} and that.")
    assert not allows('<tool_call>\n{"name": "stop", "arguments": {"later": true}}\n</tool_call>')
    assert not allows("<tool_call>\nno")


def test_bare_json_calls_under_auto(folder: ModelFolder) -> None:
    model = Model(folder, Llama3())
    asked = Conversation(ASK, (replace(STOP, strict=True),))
    grammars = model.grammars()
    assert model.follows(_some(grammars.constraint(asked, "", "acme")), "Text with {braces}.")
    assert model.follows(_some(grammars.constraint(asked, "", "acme")), '{"name": "stop", "parameters": {}}')
    assert not model.follows(_some(grammars.constraint(asked, "", "acme")), '{"name": "start"}')


def test_nothing_is_constrained_without_need(folder: ModelFolder) -> None:
    grammars = Model(folder, Hermes()).grammars()
    assert grammars.constraint(Conversation(ASK), "", "acme") is None
    assert grammars.constraint(Conversation(ASK, TOOLS), "", "acme") is None
    assert grammars.constraint(Conversation(ASK, TOOLS, ToolChoice(ToolMode.NONE)), "", "acme") is None
    one = Conversation(ASK, TOOLS, ToolChoice(parallel=False))
    assert grammars.constraint(one, "", "acme") is not None


def test_at_most_one_call_where_that_is_asked(folder: ModelFolder) -> None:
    model = Model(folder, Hermes())
    grammars = model.grammars()
    one = Conversation(ASK, TOOLS, ToolChoice(parallel=False))
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert model.follows(_some(grammars.constraint(one, "", "acme")), f"Well. {call}")
    assert not model.follows(_some(grammars.constraint(one, "", "acme")), f"{call}\n{call}")


def test_json_answers(folder: ModelFolder) -> None:
    model = Model(folder, Hermes())
    grammars = model.grammars()
    schema = {**PAINT.parameters, "properties": {**PAINT.parameters["properties"]}}
    asked = Conversation(ASK, format=OutputFormat(schema))
    for seed in range(8):
        text = model.walk(_some(grammars.constraint(asked, "", "acme")), seed)
        jsonschema.validate(json.loads(text), schema)
        parser = model.family.parser(asked, "")
        assert "".join(p.text for p in [*parser.push(text), *parser.finish()] if isinstance(p, Said)) == text
    anything = Conversation(ASK, format=OutputFormat())
    assert model.follows(_some(grammars.constraint(anything, "", "acme")), '{"a": [1, null, {"b": "c"}]}')
    assert not model.follows(_some(grammars.constraint(anything, "", "acme")), "[1]")
    either = Conversation(ASK, TOOLS, format=OutputFormat({"type": "boolean"}))
    assert model.follows(_some(grammars.constraint(either, "", "acme")), "true")
    called = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert model.follows(_some(grammars.constraint(either, "", "acme")), called)


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_reasoning_is_free(folder: ModelFolder, special: bool) -> None:
    model = Model(folder, Hermes(), THINK)
    if special:
        model.with_special()
    grammars = model.grammars()
    asked = Conversation(ASK, format=OutputFormat({"type": "boolean"}))

    def allows(text: str, prompt: str = "") -> bool:
        return model.follows(_some(grammars.constraint(asked, prompt, "acme")), text)

    assert allows("<think>\nMaybe {not}.\n</think>\n\ntrue")
    assert allows("true")
    assert not allows("Maybe.")
    assert allows("Maybe.</think>\ntrue", "<think>\n")
    assert not allows("true", "<think>\n")
    assert allows("true", "<think>\n\n</think>\n\n")


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"$ref": "#/nowhere"}, "/nowhere"),
    ({"type": "spam"}, "spam"),
]


@pytest.mark.parametrize(("schema", "named"), UNSUPPORTED)
def test_what_cannot_be_enforced_is_refused_by_name(
    folder: ModelFolder, schema: dict[str, Any], named: str
) -> None:
    grammars = Model(folder, Hermes()).grammars()
    with pytest.raises(InvalidRequest, match=named) as caught:
        grammars.constraint(Conversation(ASK, format=OutputFormat(schema)), "", "acme")
    assert caught.value.param == "response_format"
    parameters = {"type": "object", "properties": {"value": schema}}
    with pytest.raises(InvalidRequest, match="tool 'f'") as caught:
        grammars.constraint(Conversation(ASK, (Tool("f", "", parameters, strict=True),)), "", "acme")
    assert caught.value.param == "tools"
    # Tools that are not strict never fail a turn.
    loose = Conversation(ASK, (Tool("f", "", parameters),), REQUIRED)
    assert grammars.constraint(loose, "", "acme") is not None
    assert (
        grammars.constraint(Conversation(ASK, format=OutputFormat(schema, strict=False)), "", "acme")
        is not None
    )


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "deep": _nested(400),
    "deeper": _nested(5000),
    "long": {"enum": ["x" * 300_000]},
    "patterns": {"type": "object", "properties": {"a": {"pattern": "^((((a{1,99}){1,99}){1,99}){1,99})$"}}},
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_bounded(folder: ModelFolder, name: str) -> None:
    model = Model(folder, Hermes())
    try:
        constraint = model.grammars().constraint(
            Conversation(ASK, format=OutputFormat(HOSTILE[name])), "", "acme"
        )
    except InvalidRequest:
        return
    # It compiled: then it must still say what comes next, or give up, soon.
    for token in model.encode('{"a": "aaaaaaaaaaaaaaaa'):
        model.allowed(_some(constraint))
        if not _some(constraint).took(token):
            break


def test_replies_of_one_grammar_are_apart(folder: ModelFolder) -> None:
    model = Model(folder, Hermes())
    grammars = model.grammars()
    asked = Conversation(ASK, format=OutputFormat({"type": "boolean"}))
    first, second = (_some(grammars.constraint(asked, "", "acme")) for _ in range(2))
    assert model.follows(first, "true")
    assert model.follows(second, "false")


def test_forced_tokens_are_those_that_are_allowed(folder: ModelFolder) -> None:
    model = Model(folder, Hermes(is_list=True))
    constraint = _some(model.grammars().constraint(Conversation(ASK, (STOP,), REQUIRED), "", "acme"))
    forced = list(constraint.forced())
    assert model.text(forced).startswith('<tool_call>[{"name": "stop", "arguments":')
    for token in forced:
        assert model.allowed(constraint) == [token]
        assert constraint.took(token)


def test_strict_tools_are_refused_what_a_form_leaves_out(folder: ModelFolder) -> None:
    grammars = Model(folder, FunctionGemma()).grammars()
    with pytest.raises(InvalidRequest, match="maxItems, maximum, minimum") as caught:
        grammars.constraint(Conversation(ASK, (replace(PAINT, strict=True),)), "", "acme")
    assert caught.value.param == "tools"
    assert grammars.constraint(Conversation(ASK, (replace(STOP, strict=True),)), "", "acme") is not None
    text = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x$"}}}
    with pytest.raises(InvalidRequest, match="pattern"):
        Model(folder, QwenXml()).grammars().constraint(
            Conversation(ASK, (Tool("f", "", text, strict=True),)), "", "acme"
        )


def test_a_grammar_that_gives_up_allows_nothing(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "_LIMITS", LLParserLimits(step_max_items=1, verbose_errors=False))
    model = Model(folder, Hermes())
    constraint = _some(
        model.grammars().constraint(Conversation(ASK, format=OutputFormat(STOP.parameters)), "", "acme")
    )
    # Not even the end: a reply that stops in the middle must not pass for a whole one.
    while allowed := model.allowed(constraint):
        assert model.end not in allowed
        constraint.took(allowed[0])
    assert not constraint.took(model.end)
    assert list(constraint.forced()) == []


def test_a_reply_may_go_on_from_the_clients_words(folder: ModelFolder) -> None:
    model = Model(folder, Hermes())
    grammars = model.grammars()
    wanted = OutputFormat({"type": "array", "items": {"type": "boolean"}})

    def begun(text: str) -> Conversation:
        return Conversation((*ASK, Message(Role.ASSISTANT, text)), format=wanted, continues=True)

    assert model.follows(_some(grammars.constraint(begun("[true, "), "", "acme")), "false]")
    with pytest.raises(InvalidRequest, match="continues"):
        grammars.constraint(begun("Well, "), "", "acme")


def test_other_kinds_of_vocabulary(sentencepiece_folder: ModelFolder) -> None:
    model = Model(sentencepiece_folder, Hermes(), end="</s>")
    grammars = model.grammars()
    asked = Conversation(ASK, format=OutputFormat(PAINT.parameters))
    for seed in range(3):
        text = model.walk(_some(grammars.constraint(asked, "", "acme")), seed)
        jsonschema.validate(json.loads(text), PAINT.parameters)


def _without(tool: Tool, keywords: frozenset[str]) -> Tool:
    """The tool with properties that lack these keywords."""
    properties = {
        name: {key: value for key, value in schema.items() if key not in keywords}
        for name, schema in tool.parameters["properties"].items()
    }
    return replace(tool, parameters={**tool.parameters, "properties": properties})


def _some(constraint: Constraint | None) -> Constraint:
    assert constraint is not None
    return constraint
