"""A model's chat template: messages in, prompt text out. The template is a stranger's program.

Rendered by transformers' sandbox, the one that models are published against: immutable, no access to
underscored attributes, plain JSON data in. Steps, time and output are bounded (`sandbox.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateSyntaxError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from dormouse.domain.errors import InvalidRequest, ModelError
from dormouse.models.folder import ModelFolder, read_json
from dormouse.models.sandbox import BoundedEnvironment, bounded

# transformers makes its environment from the class that it finds under this name, and has no other place for
# bounds. A test holds that it still does.
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[attr-defined]

Message = Mapping[str, Any]

TEMPLATE_FILE = "chat_template.jinja"
_EXTRA_TEMPLATES = "additional_chat_templates"
_DEFAULT, _FOR_TOOLS = "default", "tool_use"
_RESERVED = frozenset(
    {"messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "return_assistant_tokens_mask"}
)


class ChatTemplate:
    """The templates of one model folder and the special tokens they may write. Thread-safe."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: ModelFolder, settings: Mapping[str, Any]) -> ChatTemplate:
        """The templates of `folder`; `settings` are its tokenizer_config.json."""
        special = {
            role: _content(value)
            for role, value in settings.items()
            if role.endswith("_token") and isinstance(value, str | dict)
        }
        return cls(_templates(folder.path, settings), special)

    @property
    def source(self) -> str:
        """The template that conversations with tools are rendered by; empty where there is none."""
        return self._templates.get(_FOR_TOOLS) or self._templates.get(_DEFAULT, "")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt's text.

        Raises InvalidRequest with the template's own words when it rejects the messages, when there is
        no template, or when `variables` has a reserved name; ModelError when the template is broken or
        does what the sandbox forbids.
        """
        template = self._template(for_tools=bool(tools))
        if reserved := _RESERVED.intersection(variables):
            raise InvalidRequest(f"chat template variables cannot be named {', '.join(sorted(reserved))}")
        if not messages:
            raise InvalidRequest("messages is empty; send at least one", param="messages")
        # A key that is null means the same as one that is absent, and templates print "None" for it.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            with bounded():
                # Declared as a string, returned as a pair.
                result: Any = render_jinja_template(
                    [chat],
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **{**self._special_tokens, **variables},
                )
        except (SecurityError, TemplateSyntaxError) as error:
            raise ModelError(f"the model's chat template is broken or hostile: {error}") from error
        except Exception as error:
            # Whatever else a template raises, it raises over the messages.
            raise InvalidRequest(
                f"the chat template rejects the messages: {error}", param="messages"
            ) from error
        rendered, _ = result
        return str(rendered[0])

    def _template(self, *, for_tools: bool) -> str:
        names = (_FOR_TOOLS, _DEFAULT) if for_tools else (_DEFAULT,)
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise InvalidRequest(
            "this model has no chat template; send a prompt to /v1/completions instead", param="messages"
        )


def _templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files win over settings, as in transformers."""
    try:
        return _read_templates(path, settings)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"the chat templates of {path} cannot be read: {error}; download or import the model again"
        ) from error


def _read_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    declared = settings.get("chat_template")
    if declared is None and (path / "chat_template.json").is_file():
        declared = read_json(path / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(declared, str):
        templates[_DEFAULT] = declared
    elif isinstance(declared, list):
        templates.update({str(entry["name"]): str(entry["template"]) for entry in declared})
    elif isinstance(declared, dict):
        templates.update({str(name): str(template) for name, template in declared.items()})
    extra = path / _EXTRA_TEMPLATES
    for file in sorted(extra.glob("*.jinja")) if extra.is_dir() else ():
        templates[file.stem] = file.read_text(encoding="utf-8")
    if (path / TEMPLATE_FILE).is_file():
        templates[_DEFAULT] = (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    return templates


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))
