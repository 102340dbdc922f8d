"""Conversations for chat templates of several tempers. The templates here are small ones of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dormouse.domain.conversation import Conversation, Message, Role, Tool, ToolCall, ToolChoice, ToolMode
from dormouse.domain.errors import InvalidRequest
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.family import Family, callable_tools, family_of
from dormouse.models.folder import ModelFolder
from dormouse.models.rendering import template_messages
from dormouse.models.tool_formats.function_gemma import FunctionGemma
from dormouse.models.tool_formats.gemma import Gemma3
from dormouse.models.tool_formats.hermes import Hermes
from dormouse.models.tool_formats.llama import Llama3
from dormouse.models.tool_formats.mistral import Mistral
from dormouse.models.tool_formats.qwen_xml import QwenXml

TOOL = Tool(
    "weather",
    "Weather of a city.",
    {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}, "required": ["z"]},
)
CALLS = (ToolCall("call_one", "weather", '{"z": "Rome", "a": 1}'), ToolCall("call_two", "weather", "{}"))
CONVERSATION = Conversation(
    (
        Message(Role.SYSTEM, "Be brief."),
        Message(Role.USER, "Hello."),
        Message(Role.ASSISTANT, "Let me see.", reasoning="hm", calls=CALLS),
        Message(Role.TOOL, "sunny", call_id="call_one", name="weather"),
        Message(Role.TOOL, "rain", call_id="call_two", name="weather"),
        Message(Role.SYSTEM, "Stay brief."),
        Message(Role.USER, "And now?"),
        Message(Role.USER, "Or later?"),
    ),
    (TOOL,),
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
QWEN = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}"
)
STRICT = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
    "{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id }}{% endfor %}{% endif %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}={% endif %}{{ m.content }}|{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
LLAMA = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments }}}'
    "<|python_tag|>{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>{% endfor %}"
)


def render_with(source: str) -> Callable[[Any, Any], str]:
    template = ChatTemplate({"default": source}, {})
    return lambda messages, tools: template.render(
        messages, add_generation_prompt=True, tools=tools, continue_final_message=False, variables={}
    )


def family(source: str, *tokens: str) -> Family:
    return family_of(source, set(tokens).__contains__, render_with(source))


def rendered(source: str, conversation: Conversation = CONVERSATION) -> str:
    found = family(source)
    return render_with(source)(*template_messages(conversation, found.tool_format, found.accepts))


@pytest.mark.parametrize("source", [PLAIN, QWEN, STRICT, LLAMA, NO_SYSTEM])
def test_every_word_reaches_every_template(source: str) -> None:
    text = rendered(source)
    for word in ("Be brief.", "Hello.", "Rome", "sunny", "rain", "Stay brief.", "And now?", "Or later?"):
        assert word in text or (source == STRICT and word == "Rome"), word
    assert TOOL.description in text


def test_arguments_are_objects_and_keys_keep_their_order() -> None:
    text = rendered(QWEN)
    assert '<tool_call>{"z": "Rome", "a": 1}</tool_call>' in text
    assert text.index('"z"') < text.index('"a"')


def test_a_template_without_tools_is_taught_them_in_the_first_system_message() -> None:
    found = family(PLAIN)
    messages, tools = template_messages(CONVERSATION, found.tool_format, found.accepts)
    assert tools is None
    assert messages[0]["role"] == "system"
    assert messages[0]["content"].startswith("Be brief.\n\nYou have access")
    assert json.dumps(dict(TOOL.parameters)) in messages[0]["content"]
    assert messages[2]["content"].startswith('Let me see.\n<tool_call>[{"name": "weather", ')
    assert "tool_calls" not in messages[2]
    assert messages[3] == {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}
    # Where no tools are offered any more, what was called before is text all the same.
    later, _ = template_messages(Conversation(CONVERSATION.messages), found.tool_format, found.accepts)
    assert later[1:] == messages[1:]
    assert later[0]["content"] == "Be brief."


def test_strict_templates_get_one_system_message_and_turns() -> None:
    found = family(STRICT)
    messages, _ = template_messages(CONVERSATION, found.tool_format, found.accepts)
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert messages[0]["content"] == "Be brief.\n\nStay brief."
    assert messages[-1]["content"] == "And now?\n\nOr later?"


def test_ids_fit_the_template_and_results_keep_to_their_calls() -> None:
    found = family(STRICT)
    messages, _ = template_messages(CONVERSATION, found.tool_format, found.accepts)
    ids = [call["id"] for call in messages[2]["tool_calls"]]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ids
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    assert len(set(ids)) == 2


def test_a_template_that_takes_one_call_gets_them_one_by_one() -> None:
    found = family(LLAMA)
    messages, _ = template_messages(CONVERSATION, found.tool_format, found.accepts)
    assert [message["role"] for message in messages][2:6] == ["assistant", "tool", "assistant", "tool"]
    assert messages[3]["content"] == "sunny"


def test_families_are_told_by_template_and_vocabulary() -> None:
    assert family(PLAIN).tool_format == Hermes(is_list=True)
    assert family(PLAIN, "<tool_call>").tool_format == Hermes()
    assert family(PLAIN, "[TOOL_CALLS]", "[ARGS]").tool_format == Mistral(is_named=True)
    assert family(PLAIN, "<|python_tag|>").tool_format == Llama3()
    assert family(PLAIN, "<start_function_call>").tool_format == FunctionGemma()
    assert family(NO_SYSTEM).tool_format == Gemma3()
    assert family(QWEN).tool_format == Hermes()
    assert family(QWEN + "{# <function= <parameter= #}").tool_format == QwenXml()
    assert family(STRICT).tool_format == Mistral()
    assert family(LLAMA).tool_format == Llama3()
    unknown = family("{{ tools | tojson }}{{ messages[0].content }}")
    assert not unknown.accepts.tools
    assert unknown.tool_format == Hermes(is_list=True)


def test_reasoning_is_told_by_its_markers() -> None:
    assert family(PLAIN).thinking is None
    thinking = family(PLAIN + "{# </think> #}")
    assert thinking.is_thinking("<assistant><think>\n")
    assert not thinking.is_thinking("<assistant><think>\n\n</think>\n\n")
    assert family(PLAIN, "[THINK]", "[/THINK]").thinking is not None


def test_the_choice_says_what_may_be_called() -> None:
    both = Conversation(CONVERSATION.messages, (TOOL, Tool("other")))
    assert callable_tools(both) == both.tools
    assert callable_tools(Conversation((), both.tools, ToolChoice(ToolMode.NONE))) == ()
    assert callable_tools(Conversation((), both.tools, ToolChoice(names=("other",)))) == both.tools[1:]


def test_the_embedded_model_renders_conversations(smollm2: ModelFolder) -> None:
    chat = ChatModel.load(smollm2)
    text = chat.render_conversation(CONVERSATION)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou have access")
    assert text.endswith("<|im_start|>assistant\n")
    messages = (Message(Role.USER, "Count."), Message(Role.ASSISTANT, "One, two,"))
    assert chat.render_conversation(Conversation(messages, continues=True)).endswith("One, two,")
    with pytest.raises(InvalidRequest, match="empty"):
        chat.render_conversation(Conversation(()))
