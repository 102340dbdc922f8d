"""Agents: named, durable conversations. An agent is a ref; its history is a chain of links."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.domain.blocks import BlockKey, Link, Namespace
from dormouse.domain.errors import InvalidRequest

MAX_NAME_LENGTH = 256
MAX_TAG_LENGTH = 64
MAX_CHECKPOINTS = 256
DEFAULT_TENANT = "default"
AGENT_ACTIONS = frozenset(
    {"checkpoints", "export", "fork", "import", "messages", "rollback", "sleep", "wake", "why"}
)
"""Last parts of paths below an agent."""


def check_agent_name(name: str) -> str:
    """`name` if it can name an agent. Raises InvalidRequest otherwise.

    Names never become paths, so slashes and any script are fine; control characters would only hide
    in logs and listings.
    """
    if not name or len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(
            f"agent name has {len(name)} characters; use 1 to {MAX_NAME_LENGTH}", param="agent"
        )
    if name in (".", ".."):
        raise InvalidRequest("agent names cannot be . or .., which URLs swallow", param="agent")
    if not name.isprintable():
        raise InvalidRequest("agent name has control characters; remove them", param="agent")
    return name


def check_new_agent_name(name: str) -> str:
    """`name` if an agent can be made with it. Raises InvalidRequest otherwise.

    Names may hold slashes, so one that ends as the path of an action does would hide that action.
    """
    _, *rest = check_agent_name(name).split("/")
    if rest and (rest[-1] in AGENT_ACTIONS or rest[-2:-1] == ["checkpoints"] or name.endswith("/")):
        raise InvalidRequest(
            f"agent names do not end in /{rest[-1]}, which is a path of the API; choose another", param="name"
        )
    return name


def check_tag(tag: str) -> str:
    """`tag` if it can name a checkpoint. Raises InvalidRequest otherwise."""
    if not tag or len(tag) > MAX_TAG_LENGTH or not tag.isprintable() or "/" in tag or tag in (".", ".."):
        raise InvalidRequest(
            f"a checkpoint's name has 1 to {MAX_TAG_LENGTH} printable characters and no slash", param="name"
        )
    return tag


@dataclass(frozen=True, slots=True)
class AgentId:
    """Who an agent is: its tenant, its name and the namespace (model and format) of its chain."""

    tenant: str
    name: str
    namespace: Namespace


@dataclass(frozen=True, slots=True)
class AgentUpdate:
    """What one reply makes of an agent: its whole chain, and the few tokens after the last block.

    `rest` are tokens whose KV was never computed (at least the last sampled one).
    """

    id: AgentId
    model: str
    links: tuple[Link, ...]
    rest: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the history."""
        return sum(len(link.tokens) for link in self.links) + len(self.rest)


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent as the catalog knows it. Times are Unix seconds.

    `durable_tokens` counts leading tokens whose KV is on disk, `stored_nbytes` the bytes of those blocks
    (shared ones counted in full). `parent` is the agent that it was forked from, after `parent_tokens`
    tokens; empty for none. `quota_nbytes` bounds the blocks that only it has; 0 is no bound.
    """

    id: AgentId
    model: str
    tip: BlockKey
    num_tokens: int
    durable_tokens: int
    stored_nbytes: int
    pinned: bool
    created_at: float
    used_at: float
    parent: str = ""
    parent_tokens: int = 0
    quota_nbytes: int = 0
    num_checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of an agent that was given a name, to go back to. `created_at` is in Unix seconds."""

    tag: str
    tip: BlockKey
    num_tokens: int
    created_at: float
