"""Grammars as text, in the dialect of Lark that llguidance reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dormouse.models.reply_parser import ThinkingMarkers
from dormouse.models.tool_formats.base import (
    CallForm,
    Choice,
    Json,
    Literal,
    Marker,
    Maybe,
    Part,
    Pattern,
    Repeated,
)

MOST_CALLS = 16
"""Calls in one reply that a grammar allows: a model that cannot stop comes to an end."""

_ANY_TEXT = r"/(?s:.*)/"
_JSON_STYLE = {
    # As models are trained on it, and as the parser's tests expect it. Free white space would let a weak
    # model write nothing else; without it most of the punctuation is forced and costs no sampling.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # What had to be enforced in full was compiled in full before.
    "lenient": True,
}

TokenId = Callable[[str], int | None]


class LarkWriter:
    """Writes grammars for one vocabulary. `special_id` is the id of a text that is a single token and no text
    to the grammar; None for other text."""

    def __init__(self, special_id: TokenId) -> None:
        self._special_id = special_id

    def json_text(self, schema: Mapping[str, Any]) -> str:
        """A rule's body for a JSON value."""
        return self._part(Json(schema))

    def calls(self, form: CallForm, *, parallel: bool) -> str:
        """A rule's body for calls, at least one."""
        return " ".join((self._form(form.opening), self._calls_behind(form, parallel=parallel)))

    def text_or_calls(self, form: CallForm, *, parallel: bool) -> str:
        """Rules `body` and what it needs: any text, and calls wherever their marker is written."""
        if not form.opening:
            # Bare JSON: a reply either is calls from its first character on, or never.
            text = r"/([^{\s](?s:.*))?/"
            return f"body: {text} | calls\ncalls: {self._calls_behind(form, parallel=parallel)}"
        marker, *rest = form.opening
        behind = f"{self._form(rest)} {self._calls_behind(form, parallel=parallel)}"
        token = self._token(marker)
        head = f"ANY {token}" if token else "trigger"
        rules = [
            "body: called* ANY" if parallel else "body: ANY | called",
            f"called: {head} {behind}",
            f"ANY: {_ANY_TEXT}",
        ]
        if token is None:
            rules.append(f"trigger[lazy]: ANY {self._part(marker)}")
        return "\n".join(rules)

    def grammar(self, body: str, thinking: ThinkingMarkers | None, *, is_thinking: bool) -> str:
        """A whole grammar: `body`, rules or one rule's, after the reasoning if there is any."""
        rules = body if body.startswith("body:") else f"body: {body}"
        if thinking is None:
            return f"%llguidance {{}}\nstart: body\n{rules}\n"
        opening, closing = Marker(thinking.opening), Marker(thinking.closing)
        if (token := self._token(closing)) is not None:
            thought = f"thought: {_ANY_TEXT} {token}"
        else:
            thought = f"thought[lazy]: THOUGHT {self._part(closing)}\nTHOUGHT: {_ANY_TEXT}"
        start = "thought GAP body" if is_thinking else f"({self._part(opening)} thought GAP)? body"
        return f"%llguidance {{}}\nstart: {start}\n{thought}\nGAP: /[ \\t\\r\\n]{{0,4}}/\n{rules}\n"

    def _calls_behind(self, form: CallForm, *, parallel: bool) -> str:
        call = f"({' | '.join(map(self._form, form.calls))})"
        more = f"({self._form(form.separator)} {call}){{0,{MOST_CALLS - 1}}}" if parallel else ""
        return " ".join(filter(None, (call, more, self._form(form.closing))))

    def _form(self, form: Sequence[Part]) -> str:
        return " ".join(filter(None, map(self._part, form)))

    def _part(self, part: Part) -> str:
        match part:
            case Literal(text):
                return json.dumps(text) if text else ""
            case Marker(text):
                return self._token(part) or json.dumps(text)
            case Json(schema):
                return f"%json {json.dumps({**schema, 'x-guidance': _JSON_STYLE})}"
            case Pattern(pattern):
                return f"/{pattern}/"
            case Choice(options):
                return f"({' | '.join(map(self._form, options))})"
            case Maybe(form):
                return f"({self._form(form)})?"
            case Repeated(form):
                return f"({self._form(form)})*"

    def _token(self, part: Part) -> str | None:
        """A marker that is one special token. Other ones are text, in whatever tokens."""
        special = self._special_id(part.text) if isinstance(part, Marker) else None
        return None if special is None else f"<[{special}]>"
