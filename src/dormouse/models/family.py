"""How a model speaks: what its template accepts, how it calls tools, how it marks what it thinks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import regex
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from dormouse.domain.conversation import Conversation, Tool, ToolMode
from dormouse.models.rendering import Accepts, Render, accepted_by
from dormouse.models.reply_parser import FormatParser, ReplyParser, ThinkingMarkers, new_call_id
from dormouse.models.template_parser import TemplateParser
from dormouse.models.tool_formats import fitting_format, taught_format
from dormouse.models.tool_formats.base import ToolFormat

log = logging.getLogger(__name__)

_THINKING = (
    ThinkingMarkers("<think>", "</think>"),
    ThinkingMarkers("[THINK]", "[/THINK]"),
    ThinkingMarkers("<|channel>thought\n", "<channel|>"),
)


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a model's ways, by its template and vocabulary."""

    accepts: Accepts
    tool_format: ToolFormat
    thinking: ThinkingMarkers | None
    response_template: ResponseTemplate | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser of a reply must see."""
        thinking = (self.thinking.opening.strip(), self.thinking.closing) if self.thinking else ()
        return (*self.tool_format.markers, *thinking)

    def is_thinking(self, prompt_text: str) -> bool:
        """Whether a prompt ends inside the reasoning that it opened itself."""
        return self.thinking is not None and prompt_text.rstrip().endswith(self.thinking.opening.rstrip())

    def parser(
        self, conversation: Conversation, prompt_text: str, new_id: Callable[[], str] = new_call_id
    ) -> ReplyParser:
        """A reader of the reply to `conversation`: by the model's own response template if it has one."""
        tools = callable_tools(conversation)
        if self.response_template is not None:
            return TemplateParser(self.response_template, prompt_text, tools, new_id)
        return FormatParser(
            self.tool_format,
            tools,
            self.thinking,
            is_thinking=self.is_thinking(prompt_text),
            new_id=new_id,
        )


def callable_tools(conversation: Conversation) -> tuple[Tool, ...]:
    """The tools that the reply may call."""
    choice = conversation.choice
    if choice.mode is ToolMode.NONE:
        return ()
    names = frozenset(choice.names)
    return tuple(tool for tool in conversation.tools if not names or tool.name in names)


def family_of(
    source: str, has_token: Callable[[str], bool], render: Render, response_template: Any = None
) -> Family:
    """The family of a model whose template is `source`; `render` is that template. `response_template` is
    what the tokenizer's config has of that name."""
    accepts = accepted_by(render)
    taught = taught_format(source) if accepts.tools else None
    if taught is None:
        # A form that is none of ours could not be read: Dormouse teaches one that can.
        accepts = replace(accepts, tools=False)
    tool_format = taught or fitting_format(source, has_token)
    if taught is not None and taught.call_id_length is not None:
        accepts = accepted_by(render, taught.call_id_length)

    def thinks_with(markers: ThinkingMarkers) -> bool:
        in_vocabulary = has_token(markers.opening.strip()) and has_token(markers.closing)
        return in_vocabulary or markers.closing in source

    thinking = next(filter(thinks_with, _THINKING), None)
    return Family(accepts, tool_format, thinking, _response_template(response_template))


def _response_template(declared: Any) -> ResponseTemplate | None:
    """The response template, None where there is none that this version of transformers knows."""
    if declared is None:
        return None
    try:
        return load_response_template(declared)
    except (ValueError, TypeError, regex.error) as error:
        log.warning("the model's response template is not used: %s", error)
        return None
