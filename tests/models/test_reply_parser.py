"""Replies taken apart: what was said, thought and called, however the text is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.domain.conversation import Called, Piece, Said, Thought, Tool, joined
from dormouse.models.reply_parser import FormatParser, ThinkingMarkers, new_call_id
from dormouse.models.tool_formats.base import ToolFormat
from dormouse.models.tool_formats.function_gemma import FunctionGemma
from dormouse.models.tool_formats.gemma import Gemma3
from dormouse.models.tool_formats.hermes import Hermes
from dormouse.models.tool_formats.llama import Llama3
from dormouse.models.tool_formats.mistral import Mistral
from dormouse.models.tool_formats.qwen_xml import QwenXml

THINK = ThinkingMarkers("<think>", "</think>")
TOOLS = (
    Tool("weather", "Weather.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool(
        "add", "Sum.", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}}
    ),
)
FORMATS: dict[str, ToolFormat] = {
    "hermes": Hermes(),
    "smollm2": Hermes(is_list=True),
    "qwen-xml": QwenXml(),
    "llama3": Llama3(),
    "mistral": Mistral(),
    "mistral-named": Mistral(is_named=True),
    "gemma3": Gemma3(),
    "function-gemma": FunctionGemma(),
    "gemma4": FunctionGemma("<|tool_call>", "<tool_call|>", '<|"|>'),
}


def counter() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"call_{next(numbers):09d}"


def parse(
    tool_format: ToolFormat,
    chunks: Sequence[str],
    *,
    tools: Sequence[Tool] = TOOLS,
    is_thinking: bool = False,
) -> list[Piece]:
    """The pieces of a reply that came in `chunks`, neighbours of one kind joined."""
    parser = FormatParser(tool_format, tools, THINK, is_thinking=is_thinking, new_id=counter())
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish()
    return joined(pieces)


def shown(pieces: Sequence[Piece]) -> list[tuple[str, object]]:
    """Pieces, short enough to compare with what is expected."""
    return [
        (piece.call.name, json.loads(piece.call.arguments))
        if isinstance(piece, Called)
        else (type(piece).__name__, piece.text)
        for piece in pieces
    ]


WEATHER = ("weather", {"city": "Rome"})
ADD = ("add", {"a": 1, "b": 2.5})
REPLIES: dict[str, list[tuple[str, list[tuple[str, object]]]]] = {
    "hermes": [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', [WEATHER]),
        (
            'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>\n',
            [("Said", "Let me see."), WEATHER, ADD],
        ),
        ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>', [WEATHER]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call> done',
            [("weather", {"city": "</tool_call>"}), ("Said", "done")],
        ),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}', [WEATHER]),
        ("<think>\nhm\n</think>\n\nYes.", [("Thought", "hm"), ("Said", "Yes.")]),
        ("a <think> is a tag", [("Said", "a <think> is a tag")]),
        ("<think>endless ", [("Thought", "endless ")]),
        ("<think>\n\n</think>\n\n", []),
        (" \n", [("Said", " \n")]),
    ],
    "smollm2": [
        (
            '<tool_call>[{"name": "weather", "arguments": {"city": "Rome"}}, '
            '{"name": "add", "arguments": {"a": 1, "b": 2.5}}]</tool_call>',
            [WEATHER, ADD],
        ),
        ("<tool_call>[]</tool_call>", [("Said", "<tool_call>[]</tool_call>")]),
    ],
    "qwen-xml": [
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
            [WEATHER],
        ),
        (
            "ok\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>2.5</parameter>\n</function>",
            [("Said", "ok"), ADD],
        ),
        (
            "<tool_call><function=weather><parameter=city>\n12\n</parameter></function></tool_call>",
            [("weather", {"city": "12"})],
        ),
    ],
    "llama3": [
        ('{"name": "weather", "parameters": {"city": "Rome"}}', [WEATHER]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}', [WEATHER]),
        (
            '{"name": "weather", "parameters": {"city": "Rome"}}; '
            '{"name": "add", "parameters": {"a": 1, "b": 2.5}}',
            [WEATHER, ADD],
        ),
        ('{"answer": 1} is JSON', [("Said", '{"answer": 1} is JSON')]),
        (' {"broken', [("Said", ' {"broken')]),
        ('Not at the start: {"name": "weather"}', [("Said", 'Not at the start: {"name": "weather"}')]),
        ('<|python_tag|>print("x")', [("Said", '<|python_tag|>print("x")')]),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', [WEATHER]),
        (
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, '
            '{"name": "add", "arguments": {"a": 1, "b": 2.5}}]',
            [WEATHER, ADD],
        ),
    ],
    "mistral-named": [
        ('[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2.5}', [WEATHER, ADD]),
        ('Sure. [TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome"}', [("Said", "Sure."), WEATHER]),
        ('[TOOL_CALLS]weather{"city": "Rome"}', [WEATHER]),
    ],
    "gemma3": [
        ('```tool_code\n{"name": "weather", "arguments": {"city": "Rome"}}\n```', [WEATHER]),
        ('```tool_code\nprint(weather(city="Rome"))\nadd(a=1, b=2.5)\n```', [WEATHER, ADD]),
        ("```python\nweather()\n```", [("Said", "```python\nweather()\n```")]),
        ("```tool_code\nimport os\n```", [("Said", "```tool_code\nimport os\n```")]),
    ],
    "function-gemma": [
        (
            "<start_function_call>call:weather{city:<escape>Rome<escape>}<end_function_call>"
            "<start_function_call>call:add{a:1,b:2.5}<end_function_call>",
            [WEATHER, ADD],
        ),
        (
            "<start_function_call>call:weather{city:<escape>a}, b<escape>,x:[1,{y:true}]}<end_function_call>",
            [("weather", {"city": "a}, b", "x": [1, {"y": True}]})],
        ),
    ],
    "gemma4": [('<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>', [WEATHER])],
}
CASES = [(name, text, expected) for name, cases in REPLIES.items() for text, expected in cases]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_replies_are_taken_apart(name: str, text: str, expected: list[tuple[str, object]]) -> None:
    assert shown(parse(FORMATS[name], [text])) == expected
    assert parse(FORMATS[name], list(text)) == parse(FORMATS[name], [text])


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in CASES])
def test_without_tools_nothing_is_a_call(name: str, text: str) -> None:
    pieces = parse(FORMATS[name], list(text), tools=())
    assert not [piece for piece in pieces if isinstance(piece, Called)]
    if "<think>" not in text:
        assert pieces == [Said(text)]


BROKEN = [
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call> and more'),
    ("hermes", 'x \n<tool_call>{"name": "weather", </tool_call>\n y'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"n": NaN}}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 100_000),
    ("mistral-named", "[TOOL_CALLS]no call"),
    ("qwen-xml", "<tool_call>\n<function=weather>\n<parameter=city>\nRome"),
    ("function-gemma", "<start_function_call>call:weather{city:}<end_function_call>"),
    ("gemma3", "```tool_code\nweather(city=open('/etc/passwd'))\n```"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_is_no_call_is_text_as_it_was_generated(name: str, text: str) -> None:
    assert parse(FORMATS[name], [text]) == [Said(text)]


def test_a_call_behind_a_broken_one_is_found() -> None:
    text = '<tool_call>{oops <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert shown(parse(Hermes(), [text])) == [("Said", "<tool_call>{oops"), WEATHER]


def test_text_leaves_at_once_and_markers_wait() -> None:
    parser = FormatParser(Hermes(), TOOLS, THINK)
    assert parser.push("Hello") == [Said("Hello")]
    assert parser.push(" <tool") == []
    assert parser.push("box>") == [Said(" <toolbox>")]
    assert parser.push("<tool_call>{") == []
    assert parser.finish() == [Said("<tool_call>"), Said("{")]


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    assert parse(Hermes(), ["\nhm", "m\n", "</thi", "nk>\n\nYes"], is_thinking=True) == [
        Thought("hmm"),
        Said("Yes"),
    ]


def test_ids_are_letters_and_digits() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(call_id.startswith("call_") and call_id[5:].isalnum() and len(call_id) > 13 for call_id in ids)


_FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<function=weather>", "</function>"),
    *("<parameter=city>", "</parameter>", "[TOOL_CALLS]", "weather", "[ARGS]", "<|python_tag|>", ";"),
    *("```tool_code", "```", "<start_function_call>", "<end_function_call>", "call:weather", "<escape>"),
    *('{"name": "weather", "arguments": {"city": "Rome"}}', '{"city": "x"}', "[", "]", "{", "}", '"', "\\"),
    *(" ", "\n", "\n\n", "text", "<", "été", "{city:<escape>a<escape>}"),
]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_pieces_do_not_depend_on_how_the_text_is_cut(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=4), max_size=14)))
    is_thinking = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = parse(FORMATS[name], [text], is_thinking=is_thinking)
    assert parse(FORMATS[name], chunks, is_thinking=is_thinking) == whole
    assert parse(FORMATS[name], list(text), is_thinking=is_thinking) == whole
    if not any(isinstance(piece, Called) for piece in whole):
        kept = "".join(piece.text for piece in whole if not isinstance(piece, Called))
        assert _bare(kept) == _bare(text) or "<think>" in text or is_thinking


def _bare(text: str) -> str:
    return "".join(text.split())


@given(text=st.text())
def test_a_reply_without_tools_and_reasoning_is_its_text(text: str) -> None:
    parser = FormatParser(Hermes(), (), None)
    pieces = [*parser.push(text), *parser.finish()]
    assert "".join(piece.text for piece in pieces if isinstance(piece, Said)) == text
