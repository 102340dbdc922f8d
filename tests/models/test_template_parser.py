"""Models that bring a response template: transformers' parser reads, and nothing it cannot read is lost."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.test_reply_parser import TOOLS, counter, shown

from dormouse.domain.conversation import Called, Conversation, Message, Piece, Role, Said, Thought, joined
from dormouse.models.chat import ChatModel
from dormouse.models.family import Family, family_of
from dormouse.models.folder import ModelFolder, open_folder

TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<\|call\|>",
            "close": "<|done|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
PROMPT = "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
ASKED = Conversation((Message(Role.USER, "Go."),), TOOLS)
CALL = '<|call|>{"name": "weather", "arguments": {"city": "Rome"}}<|done|>'


def family(template: Any = TEMPLATE) -> Family:
    return family_of(
        "{{ messages[0].content }}", lambda _: False, lambda messages, _: str(messages), template
    )


def parse(chunks: Sequence[str], prompt: str = PROMPT, asked: Conversation = ASKED) -> list[Piece]:
    parser = family().parser(asked, prompt, counter())
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.finish()
    return joined(pieces)


REPLIES: list[tuple[str, list[tuple[str, object]]]] = [
    ("Hello < you.", [("Said", "Hello < you.")]),
    (f"Well.\n{CALL}", [("Said", "Well."), ("weather", {"city": "Rome"})]),
    (f"<think>hm</think>{CALL}{CALL}", [("Thought", "hm"), *[("weather", {"city": "Rome"})] * 2]),
    ("<|call|>{oops<|done|> and more", [("Said", "<|call|>{oops<|done|> and more")]),
    ('<|call|>{"name": "nobody", "arguments": {}}<|done|>', [("Said", None)]),
    ('<|call|>{"name": "weather", "argu', [("Said", None)]),
    (f"<|call|>[1]<|done|>{CALL}", [("Said", "<|call|>[1]<|done|>"), ("weather", {"city": "Rome"})]),
]


@pytest.mark.parametrize(("text", "expected"), REPLIES)
def test_replies_are_read(text: str, expected: list[tuple[str, object]]) -> None:
    whole = [(kind, text) if value is None else (kind, value) for kind, value in expected]
    assert shown(parse([text])) == whole
    assert parse(list(text)) == parse([text])


def test_the_prompt_may_have_opened_the_reasoning() -> None:
    assert parse(["hm</think>Yes"], PROMPT + "<think>") == [Thought("hm"), Said("Yes")]


def test_without_tools_nothing_is_a_call() -> None:
    assert parse([CALL], asked=Conversation(ASKED.messages)) == [Said(CALL)]


@given(
    st.lists(st.sampled_from([CALL, "<|call|>", "<|done|>", "{", '"', " ", "\n", "text", "<"]), max_size=8),
    st.lists(st.integers(0, 200), max_size=5),
)
def test_no_text_is_lost_and_cuts_do_not_matter(fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    ends = sorted(min(cut, len(text)) for cut in cuts)
    chunks = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]
    whole = parse([text])
    assert parse(chunks) == whole
    said = "".join(piece.text for piece in whole if isinstance(piece, Said))
    num_calls = sum(isinstance(piece, Called) for piece in whole)
    assert "".join(said.split()) == "".join(text.replace(CALL, "", num_calls).split()) or CALL in said


def test_a_template_that_is_not_understood_is_left_aside() -> None:
    assert family({"version": 99}).response_template is None
    assert family({"fields": {"x": {"open_pattern": "("}}, "start_anchor": "x"}).response_template is None


def test_markers_that_are_special_tokens_are_shown(byte_level_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_level_folder.path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    for offset, text in enumerate(("<|call|>", "<|done|>", "<|other|>")):
        added = {"id": size + offset, "content": text, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(added | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"response_template": TEMPLATE}))
    chat = ChatModel.load(open_folder(folder))
    ids = chat.encode("a<|call|>b<|done|>c<|other|>d<|im_end|>", add_special_tokens=False)
    assert chat.decode(ids) == "a<|call|>b<|done|>cd"
