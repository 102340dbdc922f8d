"""Whose request it is, as far as clients tell. Names label lineage and never authorize: they are looked up
within the caller's tenant alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from dormouse.domain.agents import check_agent_name
from dormouse.domain.errors import InvalidRequest
from dormouse.domain.requests import Priority

AGENT_HEADER = "x-agent-id"
_SESSION_HEADERS = (
    ("x-session-affinity", "opencode"),
    ("x-session-id", "session"),
    ("x-openwebui-chat-id", "openwebui"),
)
_SIDE = "/side"
_SIDE_CLASSES = frozenset({"auxiliary"})
_OLD_USER_ID = re.compile(r"^user_[0-9a-f]+_account_[^_]*_session_(?P<session>[0-9a-f-]+)$", re.I)
"""What Claude Code sent before 2.1.78."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What bodies say about who is asking. `has_tools` tells a coding client's conversation from what it
    asks beside it."""

    has_tools: bool = False
    metadata_user_id: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    client_metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """`agent` is None for a request that nobody's name is on. `main` names the conversation beside which this
    is asked, if it is one: where that conversation exists, this is a side request."""

    agent: str | None = None
    priority: Priority = Priority.MAIN
    main: str | None = None


def identify(headers: Mapping[str, str], hints: Hints) -> Identity:
    """The first of the names that clients send, in the order of how exact they are.

    Raises InvalidRequest when `x-agent-id` is no name; what clients send by themselves is made one.
    """
    own = headers.get(AGENT_HEADER)
    if own:
        return Identity(check_agent_name(_utf8(own)))
    name = next((name for name in _names(headers, hints) if name), None)
    priority = Priority.MAIN
    if headers.get("x-claude-code-request-class") in _SIDE_CLASSES:
        priority = Priority.SIDE
    if not name:
        return Identity(None, priority)
    main = name.removesuffix(_SIDE) if name.endswith(_SIDE) else None
    return Identity(_as_name(name), priority, _as_name(main) if main else None)


def _names(headers: Mapping[str, str], hints: Hints) -> Iterator[str | None]:
    session = headers.get("x-claude-code-session-id") or _claude_session(hints.metadata_user_id)
    if session:
        yield _coding_name("claude-code", session, headers.get("x-claude-code-agent-id"), hints)
    yield hints.metadata_user_id
    metadata = hints.client_metadata or {}
    thread = headers.get("thread-id") or metadata.get("thread_id")
    session = headers.get("session-id") or headers.get("session_id") or metadata.get("session_id")
    if thread or session:
        # Codex: a thread is one conversation; its subagents have threads of their own.
        yield _coding_name("codex", str(thread or session), headers.get("x-openai-subagent"), hints)
    for header, client in _SESSION_HEADERS:
        if headers.get(header):
            yield f"{client}/{headers[header]}"
    yield hints.prompt_cache_key
    yield hints.user


def _coding_name(client: str, session: str, agent: str | None, hints: Hints) -> str:
    """Titles and summaries come under the name of the session as well, but without its tools: they get a
    name of their own, or each would take the conversation's place."""
    name = "/".join([client, session, *([agent] if agent else [])])
    return name if hints.has_tools else name + _SIDE


def _claude_session(user_id: str | None) -> str | None:
    """The session within `metadata.user_id`: a JSON text since Claude Code 2.1.78, a pattern before."""
    if not user_id:
        return None
    old = _OLD_USER_ID.match(user_id)
    if old:
        return old["session"]
    try:
        fields = json.loads(user_id)
    except (ValueError, RecursionError):
        return None
    session = fields.get("session_id") if isinstance(fields, dict) else None
    return session if isinstance(session, str) else None


def _as_name(text: str) -> str:
    """`text` as a name. Clients did not mean it as one, so what names cannot be becomes a digest."""
    name = _utf8(text)
    try:
        return check_agent_name(name)
    except InvalidRequest:
        return blake2b(name.encode(errors="replace"), digest_size=16).hexdigest()


def _utf8(header: str) -> str:
    """Header bytes are handed over as Latin-1; clients that send more than ASCII send UTF-8."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        return header
